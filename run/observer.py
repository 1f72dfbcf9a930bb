"""What watches a training: the loop calls every observer at the same moments, and does not know which there are."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training_step import Step


class Observer:
    """The moments of a training. An observer defines those it needs."""

    name = ""  # under which a checkpoint keeps its state
    ended = False  # True: the training ends here, before its last step
    interrupted = False  # True: it ends here to be continued later, from a checkpoint of this step

    def start(self, first: int) -> None:
        """Before step `first`."""

    def on_gradients(self, done: "Step") -> None:
        """The gradients are reduced, and not yet clipped."""

    def after(self, number: int, done: "Step") -> None:
        """Step `number` is done, unless `done.is_finite` says that it was skipped."""

    def close(self) -> None:
        """The loop is left, by its end or by an error."""

    def result(self) -> dict:
        """What result.json says of it."""
        return {}

    def draw(self) -> None:
        """Its pictures. By now what was learnt is saved."""

    def state_dict(self) -> dict:
        """What a resumed run needs, as JSON can hold it."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Continue from it."""
