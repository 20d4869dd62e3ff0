"""`backtrail demo`: the whole story on real data."""

from pathlib import Path

from backtrail.cli import show
from backtrail.extras import need


def demo(*, out: Path = Path("backtrail-demo")) -> None:
    """Train on handwritten digits, some with wrong labels, and find who did harm, when, and how sure that is.

    Example: backtrail demo --out my-demo

    Takes about half a minute, downloads nothing, and needs pip install 'backtrail[demo]'.

    Args:
        out: Folder for the run, the influence, the pictures and the training as task.py. Where
            there is something already, a numbered one beside it is taken: nothing is overwritten.
    """
    for module in ("sklearn", "matplotlib"):  # before any work is done
        need(module, "demo")
    import torch

    from backtrail.cli import demo_story

    torch.set_num_threads(1)  # matrices this small are slower on several cores than on one
    folder = fresh(out)
    show.say("backtrail demo: which training samples made this model what it is, and when?")
    if folder != out:
        show.say(f"({out} is there already and stays as it is; this goes to {folder})")
    demo_story.tell(folder)


def fresh(out: Path) -> Path:
    """The folder, or a numbered one beside it if there is something in it."""
    number, folder = 1, out
    while folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        number += 1
        folder = out.with_name(f"{out.name}-{number}")
    return folder
