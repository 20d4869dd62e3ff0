"""`backtrail demo`: a tour of the library on real data."""

from pathlib import Path

from backtrail.cli import show
from backtrail.extras import need


def demo(*, out: Path = Path("backtrail-demo")) -> None:
    """Train on digits, some mislabelled, and find which samples hurt, when, and how certain we are.

    Example: backtrail demo --out my-demo

    Takes about half a minute, downloads nothing, and needs pip install 'backtrail[demo]'.

    Args:
        out: Folder for the run, the influence, the plots and the training as task.py. If it is not
            empty, a numbered folder next to it is used; nothing is overwritten.
    """
    # Before any work is done.
    for module in ("sklearn", "matplotlib"):
        need(module, "demo")
    import torch

    from backtrail.cli import demo_story

    # Matrices as small as the demo's are slower on several cores than on one.
    torch.set_num_threads(1)
    folder = unused_folder(out)
    show.say("backtrail demo: which training samples made this model what it is, and when?")
    if folder != out:
        show.say(f"({out} exists and is not changed; writing to {folder})")
    demo_story.run_demo(folder)


def unused_folder(out: Path) -> Path:
    """The folder itself, or a numbered one next to it if it is not empty."""
    number = 1
    folder = out
    while folder.exists() and not _is_empty_folder(folder):
        number += 1
        folder = out.with_name(f"{out.name}-{number}")
    return folder


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
