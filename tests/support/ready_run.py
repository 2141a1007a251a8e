"""A workdir as training leaves it, without the minutes of compiling a training step."""

from pgpsam_jax.checkpointing import checkpoint, frozen_weights
from pgpsam_jax.config import serialization
from pgpsam_jax.data import dataset, fewshot_list
from pgpsam_jax.data.batch_sampler import make_loader
from pgpsam_jax.evaluation import workdirs
from pgpsam_jax.inference import restore
from pgpsam_jax.methods import build
from pgpsam_jax.training.plan import TrainingPlan
from pgpsam_jax.training.train_state import init_state
from pgpsam_jax.utils.files import write_json
from tests.support.small_run import config_for


def ready_run(root, workdir, *, predictor=None, evaluated=True, **settings):
    """Random weights as checkpoint 6, its label table, few-shot list and evaluation; `workdir`.

    `predictor` is evaluated in the model's place where the scores do not matter.
    """
    config = build.resolve_method_defaults(config_for(root, eval__overlays=False, **settings))
    split = dataset.find_split(config.data)
    config.data.axis = dataset.axis_of(config.data, split.train)
    table = split.table
    _, params, frozen, digest = build.init_model(config.model, table.num_classes, config.seed)
    fewshot_list.FewShotList([("a", 4), ("b", 5)], {"rule": "by hand"}).write(
        workdir / "fewshot.txt"
    )
    write_json(workdir / "labels.json", table.to_json())
    serialization.save_config(config, workdir)
    frozen_weights.pin_frozen_weights(workdir, config.model.base, digest, frozen)
    state = init_state(
        params, TrainingPlan.from_config(config).make_optimizer(2), seed=0, epoch_size=2
    )
    loader = make_loader(8, batch_size=8, seed=0)
    state.step += config.train.steps
    checkpoints = checkpoint.Checkpoints(workdir)
    checkpoints.save(state, loader)
    checkpoints.close()
    loader.close()
    if evaluated:
        predictor = predictor or restore.load_predictor(config, workdir, table.names)
        workdirs.run_evaluation(config, workdir, predictor, split)
    return workdir
