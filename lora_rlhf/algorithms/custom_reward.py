# SPDX-License-Identifier: Apache-2.0
"""The user's own reward function, `ppo.reward: module:function`, with TRL's signature."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_rlhf.distributed.world import world
from lora_rlhf.errors import RecipeError, first_line
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.runs.disk import sha256


def describe(recipe: Recipe) -> dict[str, str]:
    """Return the entries of the record on the reward; of a function its name and file's sha256."""
    if (named := recipe.ppo.function) is None:
        return {"reward": recipe.ppo.reward}
    path = Path(named[0])
    return {"reward": f"{path.name}:{named[1]}", "reward_sha256": sha256(path)}


def load(recipe: Recipe) -> Callable[..., list[float]] | None:
    """Load the recipe's function, wrapped in checks of its result; None without one.

    Raises:
        RecipeError: The file cannot be imported, or has no such function.
    """
    if recipe.ppo.function is None:
        return None
    file, name = recipe.ppo.function
    path = Path(file)
    if not path.is_file():
        raise RecipeError(
            f"ppo.reward: there is no {path}",
            expected="module:function, a function of module.py beside the recipe",
            remedy="create the file, or correct ppo.reward",
        )
    spec = importlib.util.spec_from_file_location(f"reward_of_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(path.parent))  # for the modules beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _failed(error, path, "cannot be imported") from error
    finally:
        sys.path.remove(str(path.parent))
    function = getattr(module, name, None)
    if not callable(function):
        functions = [n for n, f in vars(module).items() if inspect.isfunction(f)]
        raise RecipeError(
            f"ppo.reward: {path.name} has no function {name!r}",
            where=str(path),
            expected=f"one of its functions: {', '.join(functions) or 'it has none'}",
        )
    return _checked(function, path, name)


def _checked(function: Callable[..., Any], path: Path, name: str) -> Callable[..., list[float]]:
    """Give a function the arguments that it takes, and check what it returns."""
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    taken = {p.name for p in parameters}

    def called(given: dict[str, Any]) -> list[float]:
        try:
            result = function(**{k: v for k, v in given.items() if takes_all or k in taken})
            if inspect.isawaitable(result):
                result = asyncio.run(_await(result))
            return [float(value) for value in result]
        except Exception as error:
            raise _failed(error, path, f"{name} failed") from error

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **given: Any) -> list[float]:
        given |= {"prompts": prompts, "completions": completions}
        given.pop("trunk_states", None)
        # On the whole batch, in one process: it may compare answers, or never say the same twice.
        values = world().of_first(lambda: called(given))
        if len(values) != len(completions):
            raise _wrong(path, name, f"returned {len(values)} numbers for {len(completions)}")
        if bad := [i for i, value in enumerate(values) if not math.isfinite(value)]:
            answer = f"{completions[bad[0]]!r:.200}"
            raise _wrong(path, name, f"returned {values[bad[0]]} for the completion {answer}")
        return values

    reward.__name__ = name
    return reward


async def _await(result: Any) -> Any:
    return await result


def _wrong(path: Path, name: str, what: str) -> RecipeError:
    return RecipeError(
        f"the reward function {name} {what}",
        where=str(path),
        expected="a list with one finite number for each completion",
        remedy="correct the function, then run the same command again",
    )


def _failed(error: Exception, path: Path, what: str) -> RecipeError:
    """Create the error for an exception in the user's file, with its line there."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    where = f"{path}:{line}" if line else str(path)
    what = f"ppo.reward: {what}: {type(error).__name__}: {first_line(error)}"
    return RecipeError(what, where=where, remedy="correct the file; --debug shows the traceback")
