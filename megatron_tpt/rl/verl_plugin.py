"""REPRO for verl 0.9: the trainer "repro_sync", by an entry point of this package in `verl.plugins`.

    python -m verl.trainer.main_ppo ... trainer.v1.trainer_mode=repro_sync +repro.alpha=0.1

It is verl's synchronous trainer with process advantages (verl_process.py). `repro.*` are the settings of our recipes.
verl loads its plug-ins in all of its processes and hides what they raise: a fault here is logged as an error before,
and a run that asks for the trainer ends, since there is none of that name.
"""

import logging

NAME = "repro_sync"


def _register() -> type:
    import verl

    if not verl.__version__.startswith("0.9."):
        raise ImportError(f"it is for verl 0.9, and this is verl {verl.__version__}")
    from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer

    from megatron_tpt.rl.verl_process import ReproAdvantages

    @register_trainer(NAME)
    class ReproTrainerSync(ReproAdvantages, PPOTrainerSync):  # type: ignore[misc]
        """verl's synchronous trainer with REPRO's process advantages."""

    return ReproTrainerSync


try:
    ReproTrainerSync = _register()
except Exception as error:
    logging.getLogger(__name__).error(
        f"verl's trainer.v1.trainer_mode={NAME} of megatron_tpt is not available: {error}: install what verl needs"
    )
    raise
