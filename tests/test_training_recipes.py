"""Recipes, and what they ask for: MESA, teachers, other weights to start from, compilation, TensorBoard."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gspn2.cli.main import main
from gspn2.training import (
    RECIPES,
    CheckpointError,
    TrainConfig,
    UserError,
    load_checkpoint,
    load_data,
    recipe_settings,
    train,
)
from gspn2.training.learner import Learner
from gspn2.training.losses import Teacher, divergence, make_teacher
from gspn2.training.model import build_model, start_weights
from gspn2.training.transforms import Preprocess, preprocess_for
from training_helpers import make_images, settings

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    return train(settings(folder, tmp_path_factory.mktemp("run") / "out", epochs=1))


# -- recipes


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_settings(name):
    config = TrainConfig(**recipe_settings(name))
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert RECIPES[name].about


@pytest.mark.parametrize(
    ("name", "model", "drop_path", "rate"),
    [
        ("tiny", "gspn2_tiny", 0.2, 5e-4),
        ("small", "gspn2_small", 0.4, 3e-4),
        ("base", "gspn2_base", 0.5, 5e-4),
    ],
)
def test_imagenet_recipes_are_the_published_ones(name, model, drop_path, rate):
    config = TrainConfig(**recipe_settings(f"in1k-{name}"))
    assert (config.model, config.drop_path, config.image_size) == (model, drop_path, (224, 224))
    assert config.peak_lr == pytest.approx(rate * config.batch_size / 512)
    assert (config.epochs, config.warmup_epochs, config.weight_decay) == (300, 20, 0.05)
    assert (config.mixup, config.cutmix, config.label_smoothing) == (0.8, 1.0, 0.1)
    assert (config.auto_augment, config.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert config.clip_grad == 5.0
    assert config.ema_decay is not None


def test_recipe_is_printed_changed_and_read_again(tmp_path, capsys):
    assert main(["train", "--recipe", "in1k-small", "--epochs", "7", "--no-compile", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["epochs"] == 7
    assert json.loads(printed)["compile"] is False
    (tmp_path / "mine.json").write_text(printed)
    options = ["--recipe", str(tmp_path / "mine.json"), "--mixup", "0.3", "--print-config"]
    assert main(["train", *options]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again == {**json.loads(printed), "mixup": 0.3}


def test_fine_tuning_of_nothing_is_refused(folder, tmp_path, capsys):
    command = ["train", "--recipe", "finetune", "--data", str(folder), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "finetune begins with trained weights: expected --init-from PATH" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wrong_recipes_are_refused(tmp_path, capsys):
    (tmp_path / "odd.json").write_text('{"learning_rate": 1}')
    (tmp_path / "list.json").write_text("[]")
    for recipe, message in (
        ("in1k-huge", "expected one of in1k-tiny, in1k-small"),
        (str(tmp_path / "none.json"), "no such file"),
        (str(tmp_path / "odd.json"), "unknown setting learning_rate"),
        (str(tmp_path / "list.json"), "expected an object"),
    ):
        assert main(["train", "--recipe", recipe]) == 2
        assert message in capsys.readouterr().err


# -- MESA and teachers


def test_divergence_is_that_of_the_distributions():
    torch.manual_seed(0)
    ours, theirs = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    p, q = (theirs / 2).softmax(1), (ours / 2).softmax(1)
    expected = 4 * (p * (p / q).log()).sum(1).mean()
    assert float(divergence(ours, theirs, 2.0)) == pytest.approx(float(expected), rel=1e-5)
    assert float(divergence(ours, ours, 3.0)) == pytest.approx(0, abs=1e-7)


def learner(config: TrainConfig, teacher: Teacher | None = None) -> Learner:
    torch.manual_seed(0)
    preprocess = preprocess_for(config)
    model = build_model(config, preprocess, 3)
    return Learner(config, model, 3, torch.device("cpu"), teacher=teacher)


def test_mesa_begins_when_it_is_told_and_pulls_towards_the_average(folder, tmp_path):
    plain = settings(folder, tmp_path, model_args={}, mixup=0.0)
    config = dataclasses.replace(plain, mesa=2.0, mesa_start=1.0)
    batch = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))]
    ours, theirs = learner(config), learner(plain)
    for each in (ours, theirs):
        each.model.eval()
        with torch.no_grad():
            for parameter in each.ema.module.parameters():
                parameter.mul_(0.5)
    before = ours.step(0, 0.0, 0.99, batch)[0], theirs.step(0, 0.0, 0.99, batch)[0]
    assert before[0] == before[1]
    for each in (ours, theirs):
        with torch.no_grad():
            for parameter in each.ema.module.parameters():
                parameter.mul_(0.5)
    inputs = batch[0][0]
    with torch.no_grad():
        apart = divergence(ours.model(inputs), ours.ema.module(inputs), 5.0)
    after = ours.step(1, 0.0, 1.0, batch)[0], theirs.step(1, 0.0, 1.0, batch)[0]
    assert float(apart) > 0
    assert float(after[0] - after[1]) == pytest.approx(2.0 * float(apart), rel=1e-3)


@pytest.mark.parametrize("hard", [False, True])
def test_student_learns_from_a_run(finished, folder, tmp_path, hard):
    config = settings(
        folder, tmp_path / "out", teacher=str(finished.out), teacher_weight=1.0, teacher_hard=hard, mixup=0.0
    )
    data = load_data(config)
    teacher = make_teacher(config, data.preprocess, data.class_names)
    inputs = torch.stack([data.test[i][0] for i in range(4)])
    own, _ = load_checkpoint(finished.out)
    with torch.no_grad():
        logits = teacher(inputs)
        assert torch.allclose(logits, own(inputs), atol=1e-5), "the same normalisation, so the same inputs"
    student = learner(dataclasses.replace(config, model_args={}), teacher)
    student.model.eval()
    with torch.no_grad():
        said = student.model(inputs)
        expected = (
            torch.nn.functional.cross_entropy(said, logits.argmax(1))
            if hard
            else divergence(said, logits, 1.0)
        )
    loss, _ = student.step(0, 1e-3, 0.0, [(inputs, torch.zeros(4, dtype=torch.int64))])
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert train(dataclasses.replace(config, epochs=1)).history


def test_teacher_sees_its_own_normalisation():
    student = Preprocess((8, 8), 3, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    teacher = Teacher(torch.nn.Identity(), (0.1, 0.2, 0.3), (0.5, 0.25, 0.1), student)
    image = torch.rand(1, 3, 8, 8)

    def normalised(mean, std):
        return (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    got = teacher(normalised(student.mean, student.std))
    assert torch.allclose(got, normalised((0.1, 0.2, 0.3), (0.5, 0.25, 0.1)), atol=1e-5)


def test_teachers_that_do_not_fit_are_refused(finished, folder, tmp_path):
    other = make_images(tmp_path / "other", per_class=4, classes=("cyan", "pink"))
    with pytest.raises(UserError, match="trained for other classes"):
        train(settings(other, tmp_path / "out", teacher=str(finished.out)))
    with pytest.raises(UserError, match="no model 'resnet_nothing'"):
        train(settings(folder, tmp_path / "out", teacher="resnet_nothing"))
    assert not (tmp_path / "out").exists()


# -- weights to start from


def test_fine_tuning_at_another_size_and_number_of_classes(finished, tmp_path):
    images = make_images(tmp_path / "images", classes=("cyan", "pink"))
    config = settings(
        images, tmp_path / "out", init_from=str(finished.out), image_size=(48, 40), layer_decay=0.7, epochs=1
    )
    model = build_model(config, preprocess_for(config), 2)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start_weights(model, config)
    source = load_file(finished.best)
    for name, tensor in model.state_dict().items():
        if tensor.shape == source[name].shape:
            assert torch.equal(tensor, source[name]), name
        else:
            assert torch.equal(tensor, fresh[name]), name
    assert {n for n in source if fresh[n].shape != source[n].shape} == {
        "classifier.weight",
        "classifier.bias",
    }
    result = train(config)
    assert result.class_names == ("cyan", "pink")
    rates = {group["lr_scale"] for group in learner(config).optimizer.param_groups}
    assert max(rates) == 1.0 > min(rates)


def test_position_embeddings_are_fitted_to_the_image_size(folder, tmp_path):
    small = settings(folder, tmp_path / "small", model="test_vit", model_args={}, epochs=1)
    large = dataclasses.replace(small, image_size=(48, 64), init_from=str(train(small).out))
    model = build_model(large, preprocess_for(large), 3)
    start_weights(model, large)
    assert model(torch.zeros(1, 3, 48, 64)).shape == (1, 3)
    assert model.pos_embed.shape[1] == 1 + 3 * 4


def test_weights_of_another_model_are_refused(finished, folder, tmp_path):
    with pytest.raises(CheckpointError, match="weights do not fit test_vit"):
        train(
            settings(folder, tmp_path / "out", model="test_vit", model_args={}, init_from=str(finished.out))
        )
    with pytest.raises(UserError, match="exclude each other"):
        settings(folder, tmp_path / "out", init_from=str(finished.out), pretrained=True)


# -- the machine


@pytest.mark.parametrize(
    ("device", "graphs"),
    [
        ("cpu", True),
        pytest.param("cuda", False, marks=pytest.mark.gpu),
        pytest.param("cuda", True, marks=pytest.mark.gpu),
    ],
)
def test_compiled_training_gives_the_same_losses(folder, tmp_path, monkeypatch, device, graphs):
    """Where compiling takes minutes, graphs are traced all the same, but run as they are."""
    if device == "cpu":
        compiled, modes = torch.compile, []

        def traced(model, mode):
            modes.append(mode)
            return compiled(model, backend="aot_eager")

        monkeypatch.setattr(torch, "compile", traced)
    # Convolutions in TF32 differ by a thousandth from one algorithm to another, which an epoch multiplies.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    changes = {"epochs": 1, "model_args": {}, "random_erasing": 0.0, "mesa": 1.0, "mesa_start": 0.0}
    changes |= {"device": device, "amp": "off"}
    plain = train(settings(folder, tmp_path / "plain", **changes))
    fused = train(settings(folder, tmp_path / "fused", compile=True, graphs=graphs, **changes))
    if device == "cpu":
        assert modes == ["reduce-overhead"] * 2, "the model and its average"
    for ours, theirs in zip(fused.history, plain.history, strict=True):
        # Other kernels on the GPU: another order of sums, step after step.
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-3 if device == "cpu" else 1e-2)
    load_checkpoint(fused.out)


def test_gradient_checkpointing_of_a_model_without_it_is_refused(folder, tmp_path, monkeypatch):
    from timm.models import EfficientNet

    monkeypatch.delattr(EfficientNet, "set_grad_checkpointing")
    with pytest.raises(UserError, match="test_efficientnet cannot recompute"):
        train(settings(folder, tmp_path / "out", grad_checkpointing=True))


def test_a_run_is_not_replaced_by_one_that_lacks_tensorboard(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("gspn2.training.tensorboard.find_spec", lambda name: None)
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(UserError, match=r"gspn2\[tensorboard\]"):
        train(settings(folder, tmp_path, tensorboard=True), overwrite=True)
    assert (tmp_path / "config.json").read_text() == "mine"


def test_tensorboard_gets_every_step_once(folder, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = settings(folder, tmp_path / "out", tensorboard=True)

    def give_up(event):
        if getattr(event, "step", 0) >= 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, on_event=give_up)
    result = train(config, resume=True)
    board = EventAccumulator(str(Path(result.out) / "tensorboard")).Reload()
    assert [entry.step for entry in board.Scalars("train/loss")] == list(range(1, 22))
    assert [entry.value for entry in board.Scalars("test/top1")] == pytest.approx(
        [row.top1 for row in result.history]
    )
    train(dataclasses.replace(config, epochs=1), overwrite=True)
    board = EventAccumulator(str(Path(result.out) / "tensorboard")).Reload()
    assert [entry.step for entry in board.Scalars("train/loss")] == list(range(1, 8)), "the older run is gone"
