"""Which objectives the configuration accepts, the content of each preset, and the error of each refused objective."""

from pathlib import Path

import pytest

from penstock.config import Config
from penstock.config.load import load_config
from penstock.errors import ConfigError

ROOT = Path(__file__).parents[4]
PRESETS = sorted((ROOT / "examples/presets").glob("*.yaml"))


def loaded(tmp_path: Path, *arguments: str) -> Config:
    base = tmp_path / "base.yaml"
    base.write_text("actor: {path: some/model}\ndata: {train: {path: prompts.jsonl}}\nloss: {eps_clip: 0.11}\n")
    return load_config(["--config", str(base), *arguments], {})


def test_every_preset_that_the_issue_names_exists() -> None:
    names = {"grpo", "dr_grpo", "dapo", "rloo", "gspo", "cispo", "sapo", "decoupled_grpo", "lite_ppo"}
    names |= {"high_entropy", "clip_cov", "kl_cov", "luspo", "dro", "reinforce_pp", "reinforce_pp_baseline"}
    assert {path.stem for path in PRESETS} == names | {"lora"}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
@pytest.mark.parametrize("max_staleness", ["0", "4"])
def test_every_preset_is_accepted_over_another_file(tmp_path: Path, preset: Path, max_staleness: str) -> None:
    arguments = ("--config", str(preset), "--staleness.max_staleness", max_staleness)
    loaded(tmp_path, "--config", str(ROOT / "examples/gsm8k/config.yaml"), *arguments)
    config = loaded(tmp_path, *arguments)
    assert config.actor.path == "some/model"
    assert config.loss.eps_clip != 0.11 or preset.stem in ("rloo", "sapo", "lora", "dro")


def test_the_preset_lora_changes_no_objective(tmp_path: Path) -> None:
    config = loaded(tmp_path, "--config", str(ROOT / "examples/presets/lora.yaml"))
    assert (config.actor.lora.rank, config.actor.lora.target_modules) == (16, "all-linear")
    assert config.optimizer.lr == pytest.approx(10 * loaded(tmp_path).optimizer.lr)
    assert config.loss == loaded(tmp_path).loss


def test_the_preset_grpo_is_the_default(tmp_path: Path) -> None:
    preset = loaded(tmp_path, "--config", str(ROOT / "examples/presets/grpo.yaml")).loss
    assert preset == loaded(tmp_path, "--loss.eps_clip", "0.2").loss


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--loss.correction.weight tis", "would be squared"),
        ("--loss.surrogate cispo --loss.correction.weight mask", "would be squared"),
        ("--loss.surrogate vespo --loss.correction.weight sequence_tis", "would be squared"),
        ("--loss.surrogate dppo_tv --loss.proximal recomputed", "no ratio to a proximal policy"),
        ("--loss.surrogate reinforce --loss.proximal approximated", "no ratio to a proximal policy"),
        ("--loss.surrogate reinforce", "staleness.max_staleness to 0"),
        ("--loss.proximal recomputed", "staleness.max_staleness to 0"),
        ("--loss.surrogate gspo --loss.c_clip 3", "loss.c_clip is 3"),
        ("--loss.c_clip 1.1", "more than 1 + eps_clip_higher"),
        ("--loss.advantage.scale mean --loss.advantage.baseline batch", "Expected baseline group, or scale none"),
        ("--loss.advantage.baseline batch", "Expected baseline group or leave_one_out, or scale none"),
        ("--loss.advantage.baseline none", "divided by loss.advantage.eps alone"),
        ("--loss.advantage.baseline none --loss.advantage.scale batch", "loss.advantage.scale is batch"),
        ("--loss.dynamic_sampling true --loss.advantage.baseline none --loss.advantage.scale none", "would be a bias"),
        ("--loss.dynamic_sampling true --loss.advantage.whitening tokens", "neither whitening nor a function"),
        ("--loss.dynamic_sampling true --kl_ctl 0.01", "Expected kl_ctl 0, as in DAPO"),
        ("--loss.dynamic_sampling true --kl_ctl 0.01 --loss.kl.place reward --loss.kl.estimator k1", "kl_ctl 0.01"),
        ("--loss.dynamic_sampling true --loss.entropy_bonus 0.1", "loss.entropy_bonus 0.1"),
        ("--loss.dynamic_sampling true --loss.sampler_kl 0.1", "loss.sampler_kl 0.1"),
        ("--loss.kl.place reward --loss.kl.estimator k1 --loss.kl.importance_weighted true", "no gradient to weigh"),
        ("--loss.kl.place reward", "loss.kl.estimator is k3 with loss.kl.place reward"),
        ("--loss.kl.place reward --loss.kl.estimator k2", "Expected loss.kl.estimator k1"),
        ("--loss.kl.estimator k1", "Expected k2 or k3"),
        ("--loss.correction.low 3 --loss.correction.high 2", "loss.correction.low is 3"),
        ("--loss.surrogate ppo --loss.correction.weight clip", "would be squared"),
        (
            "--loss.advantage.tolerance 0.1 --loss.advantage.baseline none --loss.advantage.scale none",
            "compares no rewards",
        ),
        ("--loss.correction.normalized true", "no weight to divide"),
        ("--loss.selection.covariance_low 5", "loss.selection.covariance_low is 5"),
        ("--loss.surrogate reinforce --loss.selection.entropy_share 0.2", "nothing corrects"),
        ("--loss.surrogate gpso", "did you mean gspo?"),
        ("--loss.surrogate mine:", "or your own module:function"),
        ("--loss.advantage.function mine", "expected your own module:function"),
        ("--loss.advantage.function my.rules:mean --loss.advantage.tolerance 0.1", "compares rewards itself"),
        ("--loss.advantage.function my.rules:mean --loss.dynamic_sampling true", "would be a bias"),
        ("--loss.advantage.by_function {'math':1}", "weight other than 0 (exact_match)"),
        (
            "--loss.advantage.by_function {'exact_match':1} --loss.advantage.scale none --loss.advantage.baseline none",
            "with loss.advantage.baseline none: expected group",
        ),
        ("--loss.advantage.by_function {'exact_match':1} --loss.overlong.buffer_tokens 4", "belongs to no function"),
        (
            "--loss.advantage.by_function {'exact_match':1} --loss.kl.place reward --loss.kl.estimator k1",
            "expected loss.kl.place loss",
        ),
        (
            "--loss.advantage.by_function {'exact_match':1} --reward.gates {'exact_match':1}",
            "reward.gates has exact_match",
        ),
        ("--loss.advantage.by_function {'exact_match':1} --reward.scale 2", "reward.scale is 2 with"),
        ("--loss.advantage.by_function {'exact_match':1} --reward.clip [-1,1]", "expected reward.scale 1 and"),
        ("--reward.scale 2", "reward.scale is 2 with loss.advantage.scale group, which divides it away"),
        (
            "--reward.scale 2 --loss.advantage.scale none --loss.advantage.whitening tokens",
            "with loss.advantage.whitening tokens, which divides it away",
        ),
        ("--loss.num_minibatches 9", "data.batch_size 8"),
        ("--loss.overlong.buffer_tokens 300", "sampling.max_new_tokens 256"),
        ("--loss.truncated zero --loss.overlong.buffer_tokens 4", "already loses loss.overlong.penalty"),
        ("--loss.truncated penalty --loss.overlong.buffer_tokens 4", "loss.truncated is penalty"),
    ],
)
def test_an_objective_that_makes_no_sense_is_refused_with_reason_and_key(
    tmp_path: Path, arguments: str, words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, *arguments.split())
    assert words in str(error.value)
    assert "loss." in str(error.value)
    assert "saw {" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--reward.scale 1e7 --loss.advantage.scale none", "reward.scale is 1e+07 with reward.max_magnitude 1e+06"),
        ("--reward.scale 0", "reward.scale: saw 0"),
        ("--reward.clip [1,1]", "expected [low, high] with low below high"),
        ("--reward.clip 5", "reward.clip: saw 5"),
        ("--reward.clip [0,inf]", "reward.clip"),
    ],
)
def test_a_reward_that_cannot_be_shaped_is_refused_with_its_key(tmp_path: Path, arguments: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, *arguments.split())
    assert words in str(error.value)
    assert "reward." in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--ref.mixup_alpha 0.5 --kl_ctl 0.1", "ref.mixup_alpha is 0.5 with ref.sync_steps 0"),
        ("--ref.sync_steps 3", "ref.sync_steps is 3 with kl_ctl 0"),
        ("--ref.sync_steps 3 --kl_ctl 0.1 --actor.lora.rank 4", "ref.sync_steps is 3 with actor.lora.rank 4"),
        ("--ref.sync_steps 3 --ref.mixup_alpha 0 --kl_ctl 0.1", "ref.mixup_alpha: saw 0"),
        ("--ref.sync_steps 3 --ref.mixup_alpha 1.5 --kl_ctl 0.1", "ref.mixup_alpha: saw 1.5"),
    ],
)
def test_a_reference_that_cannot_follow_is_refused(tmp_path: Path, arguments: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, *arguments.split())
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--teacher.kl_ctl 0.5", "teacher.kl_ctl is 0.5 and there is no teacher"),
        ("--teacher.reward_weight 0", "teacher.reward_weight is 0 and there is no teacher"),
        ("--teacher.path t --teacher.kl_ctl 0", "teacher.kl_ctl: saw 0"),
        ("--teacher.path t --teacher.reward_weight -1", "teacher.reward_weight: saw -1"),
        ("--teacher.path t --loss.dynamic_sampling true", "loss.dynamic_sampling is true with teacher.path 't'"),
        (
            "--teacher.path t --teacher.reward_weight 0 --kl_ctl 0.1 --loss.kl.place reward --loss.kl.estimator k1",
            "teacher.reward_weight is 0 with kl_ctl 0.1 and loss.kl.place reward",
        ),
        ("--teacher.path t --teacher.urls http://a:1", "teacher.path is 't' and teacher.urls http://a:1: expected one"),
        ("--teacher.urls http://a:1,http://a:1/", "expected each of them once"),
        ("--teacher.urls a:1", "expected http://host:port"),
        ("--teacher.urls http://u:hidden@a:1", "it holds a password"),
        ("--teacher.urls http://a:1 --teacher.max_running_requests 0", "teacher.max_running_requests: saw 0"),
        ("--teacher.urls http://a:1 --loss.dynamic_sampling true", "is true with teacher.urls http://a:1"),
        ("--teacher.urls http://a:1 --sampling.temperature 0.7", "sampling.temperature is 0.7 with teacher.urls"),
        ("--teacher.path t --loss.surrogate reinforce", "nothing corrects or limits the distance to the sampler"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(tmp_path: Path, arguments: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, *arguments.split())
    assert words in str(error.value)
    assert "hidden" not in str(error.value)


def test_servers_of_a_teacher_are_a_list_in_any_form(tmp_path: Path) -> None:
    for value in ("http://a:1,https://b:2/", "[http://a:1, https://b:2]"):
        teacher = loaded(tmp_path, "--teacher.urls", value, "--teacher.kl_ctl", "0.5").teacher
        assert (teacher.urls, teacher.teaches) == (("http://a:1", "https://b:2"), True)


def test_the_example_of_distillation_trains_its_teacher_alone(tmp_path: Path) -> None:
    config = loaded(tmp_path, "--config", str(ROOT / "examples/distillation/config.yaml"))
    assert (config.teacher.reward_weight, config.kl_ctl, bool(config.teacher.path)) == (0.0, 0.0, True)


def test_a_gate_of_a_function_that_is_never_called_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reward\.gates names format_regex: .* \(exact_match\)"):
        loaded(tmp_path, "--reward.gates", "{'format_regex':1}")
    loaded(tmp_path, "--reward.gates", "{'exact_match':1}")


@pytest.mark.parametrize(
    "arguments",
    [
        "--loss.surrogate reinforce --staleness.max_staleness 0",
        "--loss.surrogate reinforce --loss.correction.gates [geometric]",
        "--loss.surrogate reinforce --loss.sampler_kl 0.05",
        "--reward.scale 2 --reward.clip [-1,1]",
        "--reward.clip [0,1]",
        "--teacher.path t --teacher.kl_ctl 0.5 --teacher.reward_weight 0",
        "--teacher.path t --kl_ctl 0.1 --loss.kl.place reward --loss.kl.estimator k1",
        "--ref.sync_steps 3 --ref.mixup_alpha 0.6 --kl_ctl 0.1",
        "--reward.scale 0.5 --loss.advantage.scale none",
        "--reward.scale 2 --loss.truncated penalty",
        "--reward.scale 2 --loss.overlong.buffer_tokens 4",
        "--reward.scale 2 --loss.advantage.tolerance 0.1",
        "--reward.scale 2 --loss.advantage.function my.rules:mean",
        "--reward.scale 2 --kl_ctl 0.1 --loss.kl.place reward --loss.kl.estimator k1",
        "--loss.surrogate my.losses:clipped --loss.proximal recomputed --loss.correction.weight tis",
        "--loss.advantage.function my.rules:mean",
        "--loss.surrogate reinforce --loss.correction.weight tis --loss.correction.normalized true",
        "--loss.proximal recomputed --loss.correction.weight tis",
        "--loss.correction.gates [m2po,opsm,veto,k3]",
        "--loss.surrogate reinforce --loss.correction.weight sequence_clip",
        "--loss.kl.estimator k1 --loss.kl.place reward",
        "--loss.kl.estimator k1 --loss.kl.importance_weighted true",
        "--loss.kl.estimator k2 --loss.kl.importance_weighted true",
        "--loss.advantage.baseline leave_one_out",
        "--loss.advantage.baseline batch --loss.advantage.scale batch",
        "--loss.advantage.scale mean --loss.overlong.buffer_tokens 4",
        "--loss.truncated leave_out --loss.overlong.buffer_tokens 4",
        "--loss.truncated penalty --loss.truncated_penalty 0.5",
    ],
)
def test_the_same_parts_in_order_are_accepted(tmp_path: Path, arguments: str) -> None:
    loaded(tmp_path, *arguments.split())
