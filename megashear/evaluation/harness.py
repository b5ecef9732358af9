"""Run tasks of lm-evaluation-harness (`megashear eval MODEL --tasks a,b`), an optional extra.

The harness loads the Hugging Face folder itself; none of our code is between its tasks and the weights.
"""

from pathlib import Path
from typing import Any

from megashear.engine.device import rank_device
from megashear.errors import ConfigError
from megashear.evaluation.evaluate_model import find_model, verify_model
from megashear.files.atomic import write_json


def evaluate_tasks(
    model: Path, tasks: list[str], output: Path | None, limit: int | None = None, include: Path | None = None
) -> dict[str, Any]:
    """Print the harness's results for a model or run folder, and write them to a JSON file.

    Args:
        model: Model folder or run folder.
        tasks: Names of the tasks.
        limit: Examples per task; None: all.
        include: Folder with additional task files.
        output: JSON file to write.

    Returns:
        {task: {metric: value}}.

    Raises:
        ConfigError: The harness is not installed, or does not know a task.
        ModelError, StorageError: The model is not usable, or the file cannot be written.
    """
    try:
        import lm_eval
        import lm_eval.models.huggingface  # needs accelerate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise ConfigError(
            f"--tasks: lm-evaluation-harness cannot be loaded ({error}); install it: pip install 'lm-eval[hf]'"
        ) from error
    path = find_model(model)
    verify_model(path)
    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(
            f"--tasks: lm-evaluation-harness knows no {', '.join(unknown)}; `lm_eval ls tasks` lists them"
        )
    arguments = {"pretrained": str(path), "local_files_only": True}
    device = str(rank_device())
    found = lm_eval.simple_evaluate("hf", arguments, tasks=tasks, limit=limit, device=device, task_manager=manager)
    print(make_table(found))
    results: dict[str, Any] = {task: dict(values) for task, values in found["results"].items()}
    if output is not None:
        write_json(output, {"model": str(path), "results": results, "versions": found["versions"]})
    return results
