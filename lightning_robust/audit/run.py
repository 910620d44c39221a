"""The audit itself: every check in its order, adaptive attacks on what was found, and the verdict."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_robust.attacks import ThreatModel
from lightning_robust.attacks.base import check_images
from lightning_robust.attacks.context import Model
from lightning_robust.audit.adaptive import attack_adaptively
from lightning_robust.audit.budgets import Budget, budget_of
from lightning_robust.audit.checks import CHECKS, Check, Findings
from lightning_robust.audit.checks.base import CARLINI
from lightning_robust.audit.cost import Estimate, estimate
from lightning_robust.audit.result import CONFIDENCE, AuditResult, CheckResult, Seen
from lightning_robust.audit.share import Share
from lightning_robust.audit.statistics import STRAY, judge
from lightning_robust.audit.subject import Progress, Subject
from lightning_robust.audit.verdict import FINISHED, sentence_of, verdict_of
from lightning_robust.errors import UserError
from lightning_robust.metrics.intervals import wilson_interval


def audit(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | str = "8/255",
    norm: str = "linf",
    budget: str | Budget = "quick",
    surrogate: nn.Module | None = None,
    seed: int = 0,
    batch_size: int = 128,
    fast: bool = True,
    share: Share | None = None,
    progress: Progress | None = None,
    on_estimate: Callable[[Estimate], None] | None = None,
    on_check: Callable[[CheckResult], None] | None = None,
    on_stop: Callable[[AuditResult], None] | None = None,
    model_name: str = "",
    data_name: str = "",
) -> AuditResult:
    """Find out whether a model's robust accuracy can be trusted.

    Named checks (papers.md H: Carlini et al., arXiv 1902.06705; AutoAttack's warnings, arXiv 2003.01690; Athalye et
    al., arXiv 1802.00420) look at the model and at how attacks on it behave; what they find is attacked adaptively; an
    image counts as robust if it withstood everything that ran.

    Args:
        model: images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``; an ``nn.Module``, or any callable.
        images: ``(N, C, H, W)`` in [0, 1], on the model's device; on several processes this one's part.
        labels: ``(N,)`` int64.
        eps: budget in pixel units, a number or a fraction such as 8/255.
        norm: "linf", "l2" or "l1".
        budget: "quick", "standard", "full" (:data:`~lightning_robust.audit.BUDGETS`) or numbers of your own.
        surrogate: another model of the same data, to make images on that may transfer; by default the classifier inside
            a defense, or a small network that is trained on the model's answers.
        seed: of all random numbers.
        batch_size: images that are attacked at a time.
        fast: search on a stand-in with BatchNorm folded, where that gives the model's logits.
        share: which of the images this process holds, on several processes.
        progress: told what runs, and the share of it that is done.
        on_estimate: told how long it will take, before it does.
        on_check: told of each check as it is made.
        on_stop: given what there is if something ends the audit early (Ctrl-C, an error in the model, memory); what it
            was is raised on. Such a result is never "trusted".
        model_name: name of the model.
        data_name: name of the data.

    Raises:
        UserError: for images, labels or a model that cannot be audited.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        >>> images = torch.rand(100, 3, 2, 2)
        >>> result = audit(net, images, net(images).argmax(1), eps="4/255")
        >>> result.verdict, result.clean_accuracy
        ('trusted', 1.0)
    """
    numbers = budget_of(budget)
    threat_model = ThreatModel(norm, eps)  # type: ignore[arg-type]  # refuses another norm
    _ = threat_model.ball
    if threat_model.radius == 0:
        raise UserError("eps=0 leaves nothing to audit: give a budget such as 8/255")
    mistake = None
    try:
        if share is not None and share.together and len(images) == 0:
            raise UserError("a device has no image to audit: give at least as many images as there are devices")
        check_images(images)
        threat_model.check_images(images)
        _check_labels(images, labels)
    except UserError as error:
        mistake = error
    (share or Share.of_all(len(images))).agree(mistake)
    devices = [images.device] if images.device.type == "cuda" else []
    # tensors made in inference mode could not be differentiated through; a model that draws from torch's generator
    # does so by the audit's seed, and leaves the user's state as it was
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed % 2**63)
        subject = Subject(
            model,
            images.detach().clone(),
            labels.detach().clone().long(),
            threat_model,
            seed=seed,
            batch_size=batch_size,
            share=share,
            progress=progress,
            fast=fast,
        )
        return _audited(subject, numbers, surrogate, on_estimate, on_check, on_stop, model_name, data_name)


def _audited(
    subject: Subject,
    budget: Budget,
    surrogate: nn.Module | None,
    on_estimate: Callable[[Estimate], None] | None,
    on_check: Callable[[CheckResult], None] | None,
    on_stop: Callable[[AuditResult], None] | None,
    model_name: str,
    data_name: str,
) -> AuditResult:
    begun = time.perf_counter()
    if subject.classes < 2:
        raise UserError("the model has a single output: an audit needs logits of two classes or more")
    most = int(subject.share.gather(subject.labels).max())
    if most >= subject.classes:
        raise UserError(f"labels go up to {most} but the model has {subject.classes} classes: is it the data's model?")
    expected = estimate(subject, budget, random=bool(getattr(subject.model, "random", False)))
    if on_estimate is not None:
        on_estimate(expected)
    found = Findings(surrogate=surrogate)
    checks: list[CheckResult] = []

    def note(result: CheckResult) -> None:
        checks.append(result)
        if on_check is not None:
            on_check(result)

    def result() -> AuditResult:
        return _result_of(subject, budget, found, checks, expected, model_name, data_name, begun)

    try:
        for check in CHECKS:
            subject.told(check.title, 0)
            note(_made(check, subject, budget, found))
        attack_adaptively(subject, budget, found, [check.name for check in checks if check.outcome == "flag"])
        note(_finite(subject))
    except BaseException as error:
        # minutes or hours of attacks: whatever ended them, what they found is kept
        if on_stop is not None and checks:
            checks.append(_ended(error, len(checks)))
            on_stop(result())
        raise
    subject.told("", 1)
    return result()


def _result_of(
    subject: Subject,
    budget: Budget,
    found: Findings,
    checks: list[CheckResult],
    expected: Estimate,
    model_name: str,
    data_name: str,
    begun: float,
) -> AuditResult:
    verdict = verdict_of(checks)
    robust = int(subject.withstood.sum())
    interval = wilson_interval(robust, subject.total, CONFIDENCE)
    return AuditResult(
        model=model_name or type(subject.model).__name__,
        data=data_name,
        budget=budget.name,
        threat_model=subject.threat_model,
        images=subject.total,
        seed=subject.seed,
        clean_accuracy=int(subject.right.sum()) / subject.total,
        robust_accuracy=robust / subject.total,
        confidence_interval=interval,
        verdict=verdict,
        sentence=sentence_of(
            verdict,
            checks,
            threat_model=subject.threat_model,
            robust_accuracy=robust / subject.total,
            interval=interval,
            images=subject.total,
            budget=budget.name,
        ),
        checks=checks,
        attacks=subject.rows,
        seconds=time.perf_counter() - begun,
        curve=found.curve,
        landscape=found.landscape,
        estimate=expected.total,
    )


def _made(check: Check, subject: Subject, budget: Budget, found: Findings) -> CheckResult:
    begun = time.perf_counter()
    seen = check.look(subject, budget, found)
    return _result(check.name, check.title, check.rule, check.source, seen, check.mend, check.reason, begun)


def _ended(error: BaseException, made: int) -> CheckResult:
    """Stands in the place of the checks that were not made."""
    seen = Seen(
        "unsure",
        None,
        f"it ended early ({' '.join(f'{type(error).__name__}: {error}'.split())[:200]}) after {made} of "
        f"{len(CHECKS) + 1} checks",
    )
    return _result(
        FINISHED,
        "The audit came to its end",
        "unsure where something ended it early",
        CARLINI,
        seen,
        "run it again to its end",
        "",
        time.perf_counter(),
    )


def _finite(subject: Subject) -> CheckResult:
    """Whether some attack met NaN or infinite gradients on its way; it is known at the end."""
    lost, total = int(subject.non_finite.sum()), int(subject.right.sum())
    answers = int(subject.share.sum(subject.nan_answers))
    outcome = judge(lost, total) if lost else "pass"
    text = f"an attack met NaN or an infinite gradient at {lost} of {total} images, and could not go on there"
    if answers:  # too little to flag, perhaps; but nobody can say what such a model withstands
        outcome = "unsure" if outcome == "pass" else outcome
        text += f"; {answers} times the model answered a changed image with NaN"
    seen = Seen(outcome, lost / max(total, 1), text)
    return _result(
        "finite_gradients",
        "Gradients stay finite",
        f"flagged if the share of images at which an attack met NaN exceeds {STRAY:g} (exact binomial test), never "
        "passed where the model answered a changed image with NaN",
        "Athalye et al., arXiv 1802.00420 (exploding gradients)",
        seen,
        "find what divides by zero or overflows; attack in float64",
        "they are NaN or infinite where attacks go",
        time.perf_counter(),
    )


def _result(
    name: str, title: str, rule: str, source: str, seen: Seen, mend: str, reason: str, begun: float
) -> CheckResult:
    return CheckResult(
        name=name,
        title=title,
        outcome=seen.outcome,
        figure=seen.figure,
        text=seen.text,
        rule=rule,
        source=source,
        mend=seen.mend or ("" if seen.outcome == "pass" else mend),
        seconds=time.perf_counter() - begun,
        reason=seen.reason or (reason if seen.outcome == "flag" else ""),
    )


def _check_labels(images: Tensor, labels: Tensor) -> None:
    if labels.shape != (len(images),) or labels.is_floating_point():
        raise UserError(
            f"labels of shape {tuple(labels.shape)} and type {labels.dtype}: an audit needs one integer an image, here "
            f"({len(images)},)"
        )
