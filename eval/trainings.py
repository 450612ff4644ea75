"""Runs the training scripts for comparisons and sweeps: finished runs are left alone, interrupted ones resume."""

from pathlib import Path

from baselines.training import make_parser, method_of
from eval.trained import TrainedRun, read_baseline, read_proxy
from trl_proxy.runs.arguments import to_cli
from trl_proxy.runs.process import find_file, launcher, run_command, wait_until_free
from trl_proxy.runs.resume import is_finished

SCRIPTS = Path(__file__).parents[1] / "scripts"


def training_command(method: str, recipe: str, settings: dict, folder: str | Path, launch: str) -> list[str] | None:
    """The command that trains by a recipe into a folder; None if that is done.

    Args:
        method: `proxy`, or one of `baselines.training.BASELINES`.
        settings: field -> value, over the recipe.
        launch: how to run a training script, a command line.
    """
    parser = make_parser(method)
    settings = {name: parser.coerce(name, value, "--train_settings") for name, value in settings.items()}
    words = ["--config", recipe, *to_cli(settings), "--output_dir", str(folder)]
    asked = parser.asked(words)
    if lost := [name for name, value in settings.items() if asked.get(name) != value]:
        raise ValueError(f"`{lost[0]}` cannot be {settings[lost[0]]!r} on a command line: write it in {recipe}.")
    if is_finished(folder, asked, parser.defaults()):
        return None
    script = [str(SCRIPTS / "train_proxy.py")]
    if method != "proxy":
        script = [str(SCRIPTS / "train_baseline.py"), "--method", method]
    return [*launcher(launch), *script, *words]


def train_missing(
    recipes: list[str], seeds: list[int], settings: dict, output_dir: str, launch: str
) -> list[TrainedRun]:
    """Trains by recipes, `<method>=<file>` each, one run per seed under the output folder; returns all runs.

    Raises:
        ValueError: a training failed.
    """
    trained = []
    for recipe in recipes:
        name, _, path = recipe.partition("=")
        method, path = method_of(name), find_file(path)
        for seed in seeds:
            folder = str(Path(output_dir, f"{method}-seed{seed}"))
            wait_until_free(folder)
            command = training_command(method, path, settings | {"seed": seed}, folder, launch)
            if command is not None:
                print(f"Training {folder} by {path}.")
                if run_command(command):
                    raise ValueError(f"training {folder} failed, see above; the same command resumes from there.")
            trained.append(read_proxy(folder) if method == "proxy" else read_baseline(folder))
    return trained
