"""Other places that show the numbers of a run: Weights & Biases, TensorBoard."""
from dataclasses import asdict

from onecard.settings import UserError, import_package


class Wandb:
    def __init__(self, cfg, progress):
        self.wandb = import_package("wandb", "wandb_log = True")
        try:
            run = self.wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name,
                                  config=asdict(cfg), id=progress.wandb_id or None, resume="allow")
            progress.wandb_id = run.id      # a resumed run goes on in the same one
        except Exception as error:          # no account, no network, a wrong project
            raise UserError(f"wandb does not start ({error}). `wandb login` gives it your "
                            "account, WANDB_MODE=offline needs none, and --wandb_log=False goes "
                            "without it") from None

    def log(self, numbers, step):
        self.wandb.log({"iter": step, **numbers}, step=step)

    def close(self):
        self.wandb.finish()


class TensorBoard:
    def __init__(self, cfg, first_step):
        import_package("tensorboard", "tensorboard_log = True")
        from torch.utils.tensorboard import SummaryWriter
        try:                            # points behind first_step, of a killed run, will come again
            self.writer = SummaryWriter(cfg.out_dir, purge_step=first_step + 1)
        except Exception as error:
            raise UserError(f"TensorBoard cannot write into {cfg.out_dir}: {error}") from None

    def log(self, numbers, step):
        for name, number in numbers.items():
            if number is not None:
                self.writer.add_scalar(name, number, step)

    def close(self):
        self.writer.close()
