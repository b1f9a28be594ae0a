"""What DeepSpeed's optimizers know of a parameter, which ZeRO keeps in flat pieces on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_SECOND_MOMENT = "exp_avg_sq"


class ZeroOptimizer:
    """An engine's optimizer as `LearnabilityProbe` asks one: for the state of a parameter, whole.

    Every rank asks alike, as with a model that is sharded otherwise: the answer is put together by
    a collective. It is a float32 tensor of the parameter's shape, held as long as it is read.
    """

    def __init__(self, engine: Any) -> None:
        """
        Args:
            engine: What `deepspeed.initialize` made, after a checkpoint of it was loaded.
        """
        self.state: Mapping[Any, Any] = _ZeroState(engine)


class _ZeroState(Mapping[Any, Any]):
    """State by parameter. What it decides by is the same on all ranks: none may wait alone."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._steps_before = _steps_taken(engine)

    def __getitem__(self, parameter: Any) -> Mapping[str, Any]:
        inner = getattr(self._engine.optimizer, "optimizer", None)
        if inner is None:  # ZeRO is off
            state: Mapping[str, Any] = self._engine.optimizer.state[parameter]
            return state
        if not self or not parameter.requires_grad:
            raise KeyError(parameter)
        pieces: dict[str, Any] = {}
        for piece in inner.state.values():
            pieces |= piece
        if _SECOND_MOMENT not in pieces:
            # Of flat pieces: good for naming what there is, and nothing else.
            return pieces
        # Not before it is needed: the import alone takes seconds.
        from deepspeed.utils import safe_get_full_optimizer_state

        whole = safe_get_full_optimizer_state(parameter, _SECOND_MOMENT)
        if whole is None:
            raise KeyError(parameter)
        return {_SECOND_MOMENT: whole}

    def __iter__(self) -> Iterator[Any]:
        return (parameter for parameter in self._engine.module.parameters() if len(self))

    def __len__(self) -> int:
        # The pieces are connected with their parameters by the first step that is taken in this
        # process. Earlier, the ranks that have a piece would fail, and the others wait for them.
        return _steps_taken(self._engine) - self._steps_before


def _steps_taken(engine: Any) -> int:
    # Steps whose gradients overflowed are counted, but not taken.
    return int(engine.global_steps - engine.skipped_steps)
