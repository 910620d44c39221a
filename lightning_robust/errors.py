"""The one exception for what a user can mend."""


class UserError(ValueError):
    """A mistake in what the user gave: data, settings or files.

    The message is one sentence or two that name the thing and the mend. The command line prints it without a
    traceback; from Python it is an ordinary ``ValueError``.

    Args:
        message: what is wrong and what mends it.
        non_finite: images, logits or gradients are NaN or infinite: the batch is worth a look.
    """

    def __init__(self, message: str = "", *, non_finite: bool = False) -> None:
        super().__init__(message)
        self.non_finite = non_finite
