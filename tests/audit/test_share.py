"""What several processes put together, without starting any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_robust.audit import Share, audit
from lightning_robust.errors import UserError


def test_alone_a_mistake_is_raised_as_it_is() -> None:
    share, mistake = Share.of_all(3), UserError("bad", non_finite=True)
    share.agree(None)
    with pytest.raises(UserError) as met:
        share.agree(mistake)
    assert met.value is mistake


@pytest.mark.parametrize("own", [None, UserError("mine")])
def test_together_all_raise_the_first_mistake(monkeypatch: pytest.MonkeyPatch, own: UserError | None) -> None:
    share = Share(torch.arange(2))
    share.together = True
    monkeypatch.setattr(Share, "_all", staticmethod(lambda value: [("theirs", True), value]))
    with pytest.raises(UserError, match="theirs") as met:
        share.agree(own)
    assert met.value.non_finite


def test_a_process_without_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(value: Any) -> list[Any]:
        return [value, value]

    monkeypatch.setattr(Share, "_all", staticmethod(both))
    nothing = torch.zeros(0, 1, 4, 4)
    share = Share(torch.zeros(0, dtype=torch.int64), together=True)
    with pytest.raises(UserError, match="a device has no image to audit"):
        audit(nn.Flatten(), nothing, torch.zeros(0, dtype=torch.int64), share=share)
