"""
The command line: ``rl-zoo3 train --algo mdqn --env CartPole-v1``, also as ``sb3-softq train ...`` and
``python -m sb3_softq train ...``. The commands are upstream's; they know our algorithms beside its own.
"""

import argparse
import importlib
import importlib.metadata
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

from sb3_softq import ALGOS, __version__

# Command -> what it does, and where upstream has it: a function of a module, or a module that is run as a script
COMMANDS = {
    "train": ("train an agent, continue training (-i), search hyperparameters (-optimize)", "rl_zoo3.train:train"),
    "enjoy": ("watch a trained agent", "rl_zoo3.enjoy:enjoy"),
    "plot_train": ("plot the rewards seen in training", "rl_zoo3.plots:plot_train"),
    "all_plots": ("gather the evaluations of several runs, plot them, write a table", "rl_zoo3.plots:all_plots"),
    "plot_from_file": ("plot what all_plots gathered, also with rliable", "rl_zoo3.plots:plot_from_file"),
    "record_video": ("film a trained agent", "rl_zoo3.record_video"),
    "record_training": ("film the checkpoints of a run (needs the program ffmpeg)", "rl_zoo3.record_training"),
    "push_to_hub": ("upload a trained agent to the Hugging Face Hub", "rl_zoo3.push_to_hub"),
    "load_from_hub": ("download a trained agent from the Hugging Face Hub", "rl_zoo3.load_from_hub"),
}


def main() -> None:
    """Run the command that the first argument names; what follows are upstream's arguments of that command."""
    program = Path(sys.argv[0]).name
    if program == "__main__.py":
        program = "python -m sb3_softq"
    parser = _parser(program)
    if len(sys.argv) == 1:
        parser.print_help(sys.stderr)
        sys.exit(2)
    # Only the first argument is ours
    command = parser.parse_args(sys.argv[1:2]).command
    sys.argv = [f"{program} {command}", *sys.argv[2:]]
    module_name, _, function_name = COMMANDS[command][1].partition(":")
    try:
        from sb3_softq.zoo.registration import register

        register()
        _adapt_to_hub()
        function = getattr(importlib.import_module(module_name), function_name) if function_name else None
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        sys.exit(f'`{program} {command}` needs {missing}, which is not installed: pip install "sb3-softq[zoo]"')
    if command == "record_training":
        _redirect_record_video()
    if function is not None:
        function()
    else:
        runpy.run_module(module_name, run_name="__main__")


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} [-h] [--version] command ...",
        description=f"rl-zoo3 with the algorithms of sb3_softq ({', '.join(ALGOS)}) beside its own.",
        epilog="commands:\n"
        + "".join(f"  {name:<17}{text}\n" for name, (text, _) in COMMANDS.items())
        + f"\nArguments of a command: {program} train --help\n"
        + f"Example: {program} train --algo mdqn --env CartPole-v1 -P",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of those below")
    parser.add_argument("--version", action="version", version=f"sb3_softq {__version__} (rl_zoo3 {_zoo_version()})")
    return parser


def _zoo_version() -> str:
    try:
        return importlib.metadata.version("rl_zoo3")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _redirect_record_video() -> None:
    """Upstream's ``record_training`` starts ``python -m rl_zoo3.record_video``, which would not know our algorithms."""
    upstream_call = subprocess.call

    def call(command: Any, *args: Any, **kwargs: Any) -> int:
        if command[:3] == ["python", "-m", "rl_zoo3.record_video"]:
            command = [sys.executable, "-m", "sb3_softq", "record_video", *command[3:]]
        return upstream_call(command, *args, **kwargs)

    subprocess.call = call  # type: ignore[assignment]


def _adapt_to_hub() -> None:
    """rl_zoo3 2.9 expects a name and an exception of the Hugging Face packages that their current versions do not have."""
    import huggingface_sb3
    from huggingface_hub.errors import HfHubHTTPError
    from requests.exceptions import HTTPError

    # The package has a function of the same name, so this is the way to the module
    pushing = importlib.import_module("huggingface_sb3.push_to_hub")
    if not hasattr(pushing, "generate_metadata"):
        # Upstream writes the result as YAML, which takes a plain dictionary
        pushing.generate_metadata = lambda *args: pushing._generate_metadata(*args).to_dict()  # type: ignore[attr-defined]

    upstream_load = huggingface_sb3.load_from_hub

    def load_from_hub(repo_id: str, filename: str) -> str:
        try:
            return upstream_load(repo_id, filename)
        except HfHubHTTPError as error:
            raise HTTPError(str(error)) from error

    huggingface_sb3.load_from_hub = load_from_hub


if __name__ == "__main__":
    main()
