"""How does the loss of a run, or of several, go down? A picture, over tokens and over hours.

    python plot.py                                  # the newest run, into its loss.png
    python plot.py out-a out-b                      # both, into loss.png
    python plot.py out-a out-b --to=both.svg

Needs matplotlib. train.py draws the same picture of its run while it trains.
"""
from dataclasses import dataclass
from pathlib import Path

from onecard import checkpoint, figure
from onecard.logfile import read_log
from onecard.settings import UserError, configure_and_run, import_package


@dataclass(frozen=True)
class PlotConfig:
    files: tuple = ()               # folders of runs; none = the newest one under out*/
    to: str = ""                    # .png, .svg or .pdf; "" = loss.png, of one run in its folder

    def __post_init__(self):
        if self.to and Path(self.to).suffix not in (".png", ".svg", ".pdf"):
            raise UserError(f"to = {self.to!r} is not a .png, .svg or .pdf")


def main(cfg):
    import_package("matplotlib", "a picture")
    import_package("matplotlib.figure", "a picture")        # it needs packages of its own
    folders = cfg.files or [checkpoint.source()]
    logs = {}                           # {folder: the entries of its log.jsonl}
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"{folder} is no folder of a run")
        logs[str(folder)] = read_log(Path(folder) / "log.jsonl")
    path = Path("loss.png")
    if cfg.to:
        path = Path(cfg.to)
    elif len(folders) == 1:
        path = Path(folders[0]) / "loss.png"
    figure.draw(logs, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    configure_and_run(main, PlotConfig, __doc__)
