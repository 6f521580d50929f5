"""What TRL, verl, AReaL and OpenRLHF call our keys.

Owns the one table. Each name is as their users write it: an argument of TRL's GRPOConfig and ModelConfig, a dotted key
of verl and AReaL (of 1.0.4, and a few that it has removed), a flag of OpenRLHF. A note shows how the value converts, or
in what the key differs. Names that are ours too (`actor.path`, `optimizer.lr`) are not listed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class OtherName:
    """`num_generations` of `TRL` is `actor.group_size`."""

    library: str
    name: str
    key: str
    note: str = ""

    def is_called(self, name: str) -> bool:
        """Whether `name` is this name, or its end: `rollout.n` of `actor_rollout_ref.rollout.n`."""
        return f".{self.name}".endswith(f".{name}")


# Notes that several names share.
_STEPS = "in steps: the ratio times the steps of the run"
_FULL_SOFTMAX = "of evaluation only: what is trained is sampled from all of the softmax (docs/sampling.md)"
_NO_EPOCHS = "not the same: it shares a batch among optimizer steps, and each group is trained once"
_FREE_SHARE = "a share of what is free when the engine starts"
_GROUPS = "counts prompts: completions of a step divided by actor.group_size"
_TOKENS = "counts tokens, not completions"
_FOLDER = "the run's folder is that of run.name in run.root"
_LORA_ON = "0 is off"
_WORDS = "its values are constant, linear and cosine"
_MODE = "tis, mask, sequence_tis or sequence_mask; ppo needs loss.proximal recomputed with it"
_ROUTER_REPLAY = "R3 is true, disabled is false; R2 is not there: the first pass over a step is its only old policy"
_TRACKERS = "tensorboard, wandb, trackio; files are always written"
_KIND = "with data.train.kind: jsonl for JSONL, huggingface for Parquet or a dataset"
_EVAL_KIND = "with data.eval.kind: jsonl for JSONL, huggingface for Parquet or a dataset"
_PACKS = "a pack takes as many completions as fit, and a step as many packs as it needs"
_OFF_ON = "false is 0"
_NO_CUT = (
    "for prompt and completion together; a prompt that is too long is refused or left out (data.too_long), not cut"
)
_WHITENED = "with batch for both it is tokens, with null for both none"

_TRL: Mapping[str, tuple[str, str]] = {
    "learning_rate": ("optimizer.lr", ""),
    "lr_scheduler_type": ("optimizer.schedule", f"{_WORDS}; constant_with_warmup is constant"),
    "warmup_steps": ("optimizer.warmup_steps", ""),
    "warmup_ratio": ("optimizer.warmup_steps", _STEPS),
    "weight_decay": ("optimizer.weight_decay", ""),
    "adam_beta1": ("optimizer.beta1", ""),
    "adam_beta2": ("optimizer.beta2", ""),
    "adam_epsilon": ("optimizer.eps", ""),
    "max_grad_norm": ("optimizer.max_grad_norm", ""),
    "num_train_epochs": ("total_train_epochs", ""),
    "max_steps": ("run.max_steps", "0 instead of -1 for no limit"),
    "seed": ("run.seed", ""),
    "run_name": ("run.name", ""),
    "output_dir": ("run.root", _FOLDER),
    "resume_from_checkpoint": ("run.existing", "resume is the default: the same command goes on"),
    "report_to": ("tracking.to", _TRACKERS),
    "project": ("tracking.project", ""),
    "save_steps": ("checkpoint.every_steps", ""),
    "save_total_limit": ("checkpoint.keep", ""),
    "eval_steps": ("eval.every_steps", ""),
    "metric_for_best_model": ("eval.best_metric", "accuracy or reward, of the set in eval.best_set"),
    "load_best_model_at_end": ("checkpoint.keep_best", "`penstock export --checkpoint best` writes it as a model"),
    "early_stopping_patience": ("eval.patience", ""),
    "early_stopping_threshold": ("eval.min_delta", "from the last value that was enough better, not the highest"),
    "model_name_or_path": ("actor.path", ""),
    "dtype": ("actor.dtype", "and rollout.engine.dtype for the engine"),
    "bf16": ("actor.dtype", "true is bfloat16, false float32"),
    "gradient_checkpointing": ("actor.gradient_checkpointing", ""),
    "use_peft": ("actor.lora.rank", _LORA_ON),
    "lora_r": ("actor.lora.rank", _LORA_ON),
    "lora_alpha": ("actor.lora.alpha", ""),
    "lora_target_modules": ("actor.lora.target_modules", ""),
    "dataset_name": ("data.train.path", _KIND),
    "dataset_train_split": ("data.train.split", ""),
    "shuffle_dataset": ("data.shuffle", ""),
    "chat_template_kwargs": ("data.template_options", ""),
    "num_generations": ("actor.group_size", ""),
    "per_device_train_batch_size": (
        "data.batch_size",
        "counts prompts of a step: per_device_train_batch_size x devices x gradient_accumulation_steps / "
        "num_generations",
    ),
    "generation_batch_size": ("data.batch_size", _GROUPS),
    "gradient_accumulation_steps": ("actor.max_tokens_per_micro_batch", f"{_TOKENS}; {_PACKS}"),
    "steps_per_generation": (
        "loss.num_minibatches",
        "counts optimizer steps: steps_per_generation / gradient_accumulation_steps",
    ),
    "num_iterations": ("loss.num_minibatches", _NO_EPOCHS),
    "max_prompt_length": ("rollout.engine.context_length", _NO_CUT),
    "max_completion_length": ("sampling.max_new_tokens", ""),
    "temperature": ("sampling.temperature", ""),
    "top_p": ("eval.top_p", _FULL_SOFTMAX),
    "top_k": ("eval.top_k", _FULL_SOFTMAX),
    "min_p": ("eval.min_p", _FULL_SOFTMAX),
    "repetition_penalty": ("eval.repetition_penalty", _FULL_SOFTMAX),
    "beta": ("kl_ctl", ""),
    "sync_ref_model": ("ref.sync_steps", "true is the value of ref_model_sync_steps, false is 0"),
    "ref_model_sync_steps": ("ref.sync_steps", "counts updates of the weights: one each batch"),
    "ref_model_mixup_alpha": ("ref.mixup_alpha", ""),
    "teacher_model_name_or_path": ("teacher.path", "docs/distillation.md: of GKD; there are no answers of a teacher"),
    "epsilon": ("loss.eps_clip", ""),
    "epsilon_high": (
        "loss.eps_clip_higher",
        "with loss_type cispo subtract 1: ratios are clipped at 1 + eps_clip_higher",
    ),
    "delta": ("loss.c_clip", ""),
    "loss_type": (
        "loss.aggregation",
        "grpo is seq-mean-token-mean, dapo token-mean, dr_grpo token-sum-norm; cispo and sapo are values of "
        "loss.surrogate, with token-mean and seq-mean-token-mean",
    ),
    "importance_sampling_level": ("loss.surrogate", "token is ppo, sequence is gspo"),
    "scale_rewards": ("loss.advantage.scale", "true is group, false is none"),
    "sapo_temperature_pos": ("loss.sapo_tau_positive", ""),
    "sapo_temperature_neg": ("loss.sapo_tau_negative", ""),
    "use_bias_correction_kl": ("loss.kl.importance_weighted", ""),
    "off_policy_mask_threshold": ("loss.correction.opsm_delta", "with opsm in loss.correction.gates"),
    "vllm_importance_sampling_correction": ("loss.correction.weight", _MODE),
    "vllm_importance_sampling_mode": (
        "loss.correction.weight",
        "token_truncate is tis, token_mask mask, sequence_truncate sequence_tis; ppo needs loss.proximal recomputed",
    ),
    "top_entropy_quantile": ("loss.selection.entropy_share", ""),
    "vllm_importance_sampling_cap": ("loss.correction.high", "a mask has a lower bound too: loss.correction.low"),
    "mask_truncated_completions": ("loss.truncated", "true is leave_out"),
    "multi_objective_aggregation": (
        "loss.advantage.by_function",
        "normalize_then_sum names the functions there, with loss.advantage.whitening completions",
    ),
    "reward_weights": ("reward.functions", "a mapping of each function to its weight"),
    "reward_funcs": ("reward.functions", "a mapping of each function to its weight"),
    "max_tool_calling_iterations": ("agent.max_turns", "counts calls of the model"),
    "vllm_gpu_memory_utilization": ("rollout.engine.memory_fraction", _FREE_SHARE),
    "vllm_tensor_parallel_size": ("rollout.engine.tensor_parallel_size", ""),
    "vllm_max_model_length": ("rollout.engine.context_length", ""),
    "vllm_enable_sleep_mode": ("trainer.take_turns", ""),
}

_VERL: Mapping[str, tuple[str, str]] = {
    "data.train_files": ("data.train.path", _KIND),
    "data.val_files": ("data.eval.path", _EVAL_KIND),
    "data.train_batch_size": ("data.batch_size", ""),
    "data.max_prompt_length": ("rollout.engine.context_length", _NO_CUT),
    "data.max_response_length": ("sampling.max_new_tokens", ""),
    "data.prompt_key": ("data.train.columns.prompt", ""),
    "data.filter_overlong_prompts": ("data.too_long", "true is drop, false error"),
    "data.truncation": ("data.too_long", "only error exists: prompts are not cut"),
    "data.train_max_samples": ("data.train.size", "0 instead of -1 for all"),
    "data.apply_chat_template_kwargs": ("data.template_options", ""),
    "actor_rollout_ref.model.path": ("actor.path", ""),
    "actor_rollout_ref.model.enable_gradient_checkpointing": ("actor.gradient_checkpointing", ""),
    "actor_rollout_ref.actor.router_replay.mode": ("actor.router_replay", _ROUTER_REPLAY),
    "actor_rollout_ref.rollout.enable_rollout_routing_replay": ("actor.router_replay", "one key for both sides"),
    "actor_rollout_ref.model.lora_rank": ("actor.lora.rank", ""),
    "actor_rollout_ref.model.lora_alpha": ("actor.lora.alpha", ""),
    "actor_rollout_ref.model.target_modules": ("actor.lora.target_modules", ""),
    "actor_rollout_ref.actor.optim.lr": ("optimizer.lr", ""),
    "actor_rollout_ref.actor.optim.lr_warmup_steps": ("optimizer.warmup_steps", ""),
    "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": ("optimizer.warmup_steps", _STEPS),
    "actor_rollout_ref.actor.optim.warmup_style": ("optimizer.schedule", ""),
    "actor_rollout_ref.actor.optim.lr_scheduler_type": ("optimizer.schedule", ""),
    "actor_rollout_ref.actor.optim.min_lr_ratio": ("optimizer.min_lr_ratio", ""),
    "actor_rollout_ref.actor.optim.weight_decay": ("optimizer.weight_decay", ""),
    "actor_rollout_ref.actor.grad_clip": ("optimizer.max_grad_norm", ""),
    "actor_rollout_ref.actor.ppo_mini_batch_size": (
        "loss.num_minibatches",
        "counts optimizer steps: data.train_batch_size / ppo_mini_batch_size",
    ),
    "actor_rollout_ref.actor.ppo_micro_batch_size": ("actor.max_tokens_per_micro_batch", _TOKENS),
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": ("actor.max_tokens_per_micro_batch", _TOKENS),
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": ("actor.max_tokens_per_micro_batch", ""),
    "actor_rollout_ref.actor.ppo_epochs": ("loss.num_minibatches", _NO_EPOCHS),
    "actor_rollout_ref.actor.clip_ratio": ("loss.eps_clip", ""),
    "actor_rollout_ref.actor.clip_ratio_low": ("loss.eps_clip", ""),
    "actor_rollout_ref.actor.clip_ratio_high": ("loss.eps_clip_higher", ""),
    "actor_rollout_ref.actor.clip_ratio_c": ("loss.c_clip", ""),
    "actor_rollout_ref.actor.entropy_coeff": ("loss.entropy_bonus", ""),
    "actor_rollout_ref.actor.loss_agg_mode": ("loss.aggregation", "seq-mean-token-sum-norm is token-sum-norm"),
    "actor_rollout_ref.actor.policy_loss.loss_mode": (
        "loss.surrogate",
        "vanilla is ppo; clip_cov and kl_cov are loss.selection.covariance",
    ),
    "actor_rollout_ref.actor.policy_loss.clip_cov_ratio": ("loss.selection.covariance_share", ""),
    "actor_rollout_ref.actor.policy_loss.clip_cov_lb": ("loss.selection.covariance_low", ""),
    "actor_rollout_ref.actor.policy_loss.clip_cov_ub": ("loss.selection.covariance_high", ""),
    "actor_rollout_ref.actor.policy_loss.kl_cov_ratio": ("loss.selection.covariance_share", ""),
    "actor_rollout_ref.actor.policy_loss.ppo_kl_coef": ("loss.selection.covariance_kl", ""),
    "actor_rollout_ref.actor.use_kl_loss": ("kl_ctl", _OFF_ON),
    "actor_rollout_ref.actor.kl_loss_coef": ("kl_ctl", ""),
    "actor_rollout_ref.actor.kl_loss_type": ("loss.kl.estimator", "kl is k1, mse is k2, low_var_kl is k3"),
    "actor_rollout_ref.rollout.n": ("actor.group_size", ""),
    "actor_rollout_ref.rollout.temperature": ("sampling.temperature", ""),
    "actor_rollout_ref.rollout.top_p": ("eval.top_p", _FULL_SOFTMAX),
    "actor_rollout_ref.rollout.top_k": ("eval.top_k", _FULL_SOFTMAX),
    "actor_rollout_ref.rollout.response_length": ("sampling.max_new_tokens", ""),
    "actor_rollout_ref.rollout.dtype": ("rollout.engine.dtype", ""),
    "actor_rollout_ref.rollout.tensor_model_parallel_size": ("rollout.engine.tensor_parallel_size", ""),
    "actor_rollout_ref.rollout.gpu_memory_utilization": ("rollout.engine.memory_fraction", _FREE_SHARE),
    "actor_rollout_ref.rollout.max_num_seqs": ("rollout.engine.max_running_requests", ""),
    "actor_rollout_ref.rollout.max_model_len": ("rollout.engine.context_length", ""),
    "actor_rollout_ref.rollout.ignore_eos": ("sampling.ignore_eos", ""),
    "actor_rollout_ref.rollout.val_kwargs.temperature": ("eval.temperature", ""),
    "actor_rollout_ref.rollout.val_kwargs.n": ("eval.samples_per_prompt", ""),
    "actor_rollout_ref.rollout.val_kwargs.top_p": ("eval.top_p", ""),
    "actor_rollout_ref.rollout.val_kwargs.top_k": ("eval.top_k", "0 instead of -1 for no limit"),
    "actor_rollout_ref.rollout.multi_turn.max_assistant_turns": ("agent.max_turns", ""),
    "algorithm.adv_estimator": (
        "loss.advantage.baseline",
        "grpo is group, rloo is leave_one_out with loss.advantage.scale none, reinforce_plus_plus none with "
        "loss.advantage.whitening tokens; there is no critic for gae",
    ),
    "algorithm.norm_adv_by_std_in_grpo": ("loss.advantage.scale", "true is group, false is none"),
    "algorithm.use_kl_in_reward": ("loss.kl.place", "true is reward, with loss.kl.estimator k1"),
    "algorithm.kl_ctrl.kl_coef": ("kl_ctl", "with loss.kl.place reward and loss.kl.estimator k1"),
    "distillation.teacher_models.teacher_model.model_path": ("teacher.path", ""),
    "distillation.distillation_loss.distillation_loss_coef": ("teacher.kl_ctl", ""),
    "distillation.distillation_loss.use_task_rewards": ("teacher.reward_weight", "false is 0"),
    "algorithm.filter_groups.enable": ("loss.dynamic_sampling", ""),
    "algorithm.rollout_correction.rollout_is": ("loss.correction.weight", "token is tis, sequence is sequence_tis"),
    "algorithm.rollout_correction.rollout_is_threshold": ("loss.correction.high", ""),
    "algorithm.rollout_correction.rollout_is_batch_normalize": ("loss.correction.normalized", ""),
    "algorithm.rollout_correction.rollout_rs": ("loss.correction.gates", "geometric is geometric, seq_mean_k3 is k3"),
    "algorithm.rollout_correction.rollout_rs_threshold": ("loss.correction.k3_high", "of seq_mean_k3"),
    "reward_model.overlong_buffer.len": ("loss.overlong.buffer_tokens", ""),
    "reward_model.overlong_buffer.penalty_factor": ("loss.overlong.penalty", ""),
    "reward_model.reward_kwargs.overlong_buffer_cfg.len": ("loss.overlong.buffer_tokens", ""),
    "reward_model.reward_kwargs.overlong_buffer_cfg.penalty_factor": ("loss.overlong.penalty", ""),
    "custom_reward_function.path": ("reward.modules_path", "the folder; reward.functions names module:function"),
    "custom_reward_function.name": ("reward.functions", 'a mapping: {"module:function": 1.0}'),
    "trainer.total_epochs": ("total_train_epochs", ""),
    "trainer.total_training_steps": ("run.max_steps", "0 for no limit"),
    "trainer.project_name": ("tracking.project", ""),
    "trainer.experiment_name": ("run.name", ""),
    "trainer.logger": ("tracking.to", _TRACKERS),
    "trainer.n_gpus_per_node": ("trainer.num_ranks", "those that train; engines have GPUs of their own"),
    "trainer.save_freq": ("checkpoint.every_steps", "0 instead of -1 for none but the last"),
    "trainer.test_freq": ("eval.every_steps", "0 instead of -1 for none but the first and the last"),
    "trainer.default_local_dir": ("run.root", _FOLDER),
    "trainer.max_actor_ckpt_to_keep": ("checkpoint.keep", ""),
    "trainer.resume_mode": ("run.existing", "auto is resume, disable is replace"),
}

_AREAL: Mapping[str, tuple[str, str]] = {
    "experiment_name": ("run.name", ""),
    "trial_name": ("run.name", ""),
    "seed": ("run.seed", ""),
    "total_train_steps": ("run.max_steps", "0 instead of null for no limit"),
    "cluster.fileroot": ("run.root", ""),
    "gconfig.n_samples": ("actor.group_size", ""),
    "gconfig.max_new_tokens": ("sampling.max_new_tokens", ""),
    "gconfig.temperature": ("sampling.temperature", ""),
    "gconfig.stop": ("sampling.stop", ""),
    "gconfig.stop_token_ids": ("sampling.stop", "texts instead of ids"),
    "gconfig.ignore_eos": ("sampling.ignore_eos", ""),
    "eval_gconfig.n_samples": ("eval.samples_per_prompt", ""),
    "eval_gconfig.temperature": ("eval.temperature", ""),
    "eval_gconfig.max_new_tokens": ("eval.max_new_tokens", ""),
    "eval_gconfig.top_p": ("eval.top_p", ""),
    "eval_gconfig.top_k": ("eval.top_k", "0 for no limit"),
    "gconfig.top_p": ("eval.top_p", _FULL_SOFTMAX),
    "gconfig.top_k": ("eval.top_k", _FULL_SOFTMAX),
    "rollout.max_head_offpolicyness": ("staleness.max_staleness", ""),
    "rollout.max_concurrent_rollouts": (
        "rollout.engine.max_running_requests",
        "counts completions of one server; (max_staleness + 1) x data.batch_size groups are outstanding at most",
    ),
    "actor.optimizer.lr": ("optimizer.lr", ""),
    "actor.optimizer.weight_decay": ("optimizer.weight_decay", ""),
    "actor.optimizer.beta1": ("optimizer.beta1", ""),
    "actor.optimizer.beta2": ("optimizer.beta2", ""),
    "actor.optimizer.eps": ("optimizer.eps", ""),
    "actor.optimizer.lr_scheduler_type": ("optimizer.schedule", ""),
    "actor.optimizer.min_lr_ratio": ("optimizer.min_lr_ratio", ""),
    "actor.optimizer.warmup_steps_proportion": ("optimizer.warmup_steps", _STEPS),
    "actor.optimizer.gradient_clipping": ("optimizer.max_grad_norm", ""),
    "actor.mb_spec.max_tokens_per_mb": ("actor.max_tokens_per_micro_batch", ""),
    "actor.use_lora": ("actor.lora.rank", _LORA_ON),
    "actor.lora_rank": ("actor.lora.rank", ""),
    "actor.lora_alpha": ("actor.lora.alpha", ""),
    "actor.target_modules": ("actor.lora.target_modules", ""),
    "actor.ppo_n_minibatches": ("loss.num_minibatches", ""),
    "actor.eps_clip": ("loss.eps_clip", ""),
    "actor.eps_clip_higher": ("loss.eps_clip_higher", ""),
    "actor.c_clip": ("loss.c_clip", ""),
    "actor.kl_ctl": ("kl_ctl", "with loss.kl.place reward and loss.kl.estimator k1"),
    "actor.temperature": ("sampling.temperature", ""),
    "actor.adv_norm.mean_level": ("loss.advantage.whitening", _WHITENED),
    "actor.adv_norm.std_level": ("loss.advantage.whitening", _WHITENED),
    "actor.reward_norm.mean_level": ("loss.advantage.baseline", "null is none; with mean_leave1out leave_one_out"),
    "actor.reward_norm.std_level": ("loss.advantage.scale", "null is none"),
    "actor.use_decoupled_loss": ("loss.proximal", "true is recomputed, with loss.correction.weight"),
    "actor.recompute_logprob": ("loss.proximal", "true is recomputed, with loss.correction.weight"),
    "actor.rejection_sampling.action": ("loss.correction.weight", "clamp is clip, or tis without a lower bound"),
    "actor.rejection_sampling.upper": ("loss.correction.high", ""),
    "actor.rejection_sampling.lower": ("loss.correction.low", "of mask, and of clip"),
    "actor.importance_sampling_level": ("loss.surrogate", "token is ppo, sequence is gspo"),
    "actor.kl_estimator": ("loss.kl.estimator", ""),
    "actor.use_sapo_loss": ("loss.surrogate", "true is sapo"),
    "actor.sapo_tau_pos": ("loss.sapo_tau_positive", ""),
    "actor.sapo_tau_neg": ("loss.sapo_tau_negative", ""),
    "actor.m2_threshold": ("loss.correction.m2po_tau", "with m2po in loss.correction.gates"),
    "actor.behav_imp_weight_cap": ("loss.correction.high", "with loss.correction.weight mask and a low of 0"),
    "actor.dynamic_sampling": ("loss.dynamic_sampling", ""),
    "dynamic_bs": ("loss.dynamic_sampling", "not the same: a batch that lost groups is filled again"),
    "actor.mask_no_eos_with_zero": ("loss.truncated", "true is zero"),
    "actor.reward_scaling": ("reward.scale", ""),
    "actor.reward_clip": ("reward.clip", "[-x, x] for x"),
    "actor.overlong_tokens": ("loss.overlong.buffer_tokens", ""),
    "actor.overlong_penalty_factor": ("loss.overlong.penalty", ""),
    "actor.weight_update_mode": ("weights.transport", ""),
    "sglang.dtype": ("rollout.engine.dtype", ""),
    "sglang.context_length": ("rollout.engine.context_length", ""),
    "sglang.max_running_requests": ("rollout.engine.max_running_requests", ""),
    "sglang.mem_fraction_static": ("rollout.engine.memory_fraction", ""),
    "train_dataset.path": ("data.train.path", _KIND),
    "train_dataset.batch_size": ("data.batch_size", ""),
    "train_dataset.shuffle": ("data.shuffle", ""),
    "valid_dataset.path": ("data.eval.path", _EVAL_KIND),
    "saver.freq_steps": ("checkpoint.every_steps", "checkpoints; `penstock export` makes a model of one"),
    "recover.freq_steps": ("checkpoint.every_steps", ""),
    "recover.mode": ("run.existing", "on or auto is resume, off or disabled is replace"),
    "evaluator.freq_steps": ("eval.every_steps", ""),
    "stats_logger.wandb.mode": ("tracking.wandb_mode", "with wandb in tracking.to"),
}

_OPENRLHF: Mapping[str, tuple[str, str]] = {
    "pretrain": ("actor.path", ""),
    "actor_learning_rate": ("optimizer.lr", ""),
    "lr_scheduler": ("optimizer.schedule", f"{_WORDS}; cosine_with_min_lr is cosine with optimizer.min_lr_ratio"),
    "lr_warmup_ratio": ("optimizer.warmup_steps", _STEPS),
    "l2": ("optimizer.weight_decay", ""),
    "adam_betas": ("optimizer.beta1", "and optimizer.beta2: one number each"),
    "max_norm": ("optimizer.max_grad_norm", ""),
    "seed": ("run.seed", ""),
    "num_episodes": ("total_train_epochs", ""),
    "max_epochs": ("loss.num_minibatches", _NO_EPOCHS),
    "rollout_batch_size": ("data.batch_size", ""),
    "train_batch_size": (
        "loss.num_minibatches",
        "counts optimizer steps: rollout_batch_size x n_samples_per_prompt / train_batch_size",
    ),
    "micro_train_batch_size": ("actor.max_tokens_per_micro_batch", _TOKENS),
    "train_max_tokens_per_gpu": ("actor.max_tokens_per_micro_batch", ""),
    "n_samples_per_prompt": ("actor.group_size", ""),
    "generate_max_len": ("sampling.max_new_tokens", ""),
    "prompt_max_len": ("rollout.engine.context_length", _NO_CUT),
    "temperature": ("sampling.temperature", ""),
    "top_p": ("eval.top_p", _FULL_SOFTMAX),
    "reward_clip_range": ("reward.clip", "[low, high]; null, the default, is no bound"),
    "init_kl_coef": ("kl_ctl", "with loss.kl.place reward, or as it is with use_kl_loss"),
    "use_kl_loss": ("loss.kl.place", "true is loss, the default; false is reward, with loss.kl.estimator k1"),
    "kl_estimator": ("loss.kl.estimator", ""),
    "eps_clip": ("loss.eps_clip", ""),
    "eps_clip_low_high": ("loss.eps_clip", "and loss.eps_clip_higher: one number each"),
    "dual_clip": ("loss.c_clip", ""),
    "policy_loss_type": ("loss.surrogate", ""),
    "entropy_loss_coef": ("loss.entropy_bonus", ""),
    "advantage_estimator": (
        "loss.advantage.baseline",
        "group_norm is group, rloo leave_one_out and dr_grpo group, these two with loss.advantage.scale none; "
        "reinforce_baseline is group with scale none and loss.advantage.whitening tokens; there is no critic for gae",
    ),
    "no_advantage_std_norm": ("loss.advantage.scale", "true is none"),
    "enable_vllm_is_correction": ("loss.correction.weight", _MODE),
    "vllm_is_truncated_threshold": ("loss.correction.high", ""),
    "stop_properly_penalty_coef": (
        "loss.truncated",
        "penalty, with loss.truncated_penalty: it is subtracted, not a factor",
    ),
    "overlong_buffer_len": ("loss.overlong.buffer_tokens", ""),
    "overlong_penalty_factor": ("loss.overlong.penalty", ""),
    "dynamic_filtering": ("loss.dynamic_sampling", ""),
    "async_queue_size": ("staleness.max_staleness", "in versions of the weights; 0 is synchronous"),
    "prompt_data": ("data.train.path", _KIND),
    "prompt_data_probs": ("data.train_sets.NAME.weight", "one for each set, which need not sum to 1"),
    "prompt_split": ("data.train.split", ""),
    "max_samples": ("data.train.size", "0 for all"),
    "input_key": ("data.train.columns.prompt", ""),
    "input_template": ("data.prompt_template", "`{}` is `{prompt}`"),
    "label_key": ("data.train.columns.answer", ""),
    "eval_dataset": ("data.eval.path", _EVAL_KIND),
    "eval_split": ("data.eval.split", ""),
    "eval_temperature": ("eval.temperature", ""),
    "eval_n_samples_per_prompt": ("eval.samples_per_prompt", ""),
    "eval_steps": ("eval.every_steps", "0 instead of -1 for none but the first and the last"),
    "save_steps": ("checkpoint.every_steps", "0 instead of -1 for none but the last"),
    "max_ckpt_num": ("checkpoint.keep", ""),
    "save_path": ("run.root", f"{_FOLDER}, with the model in final/"),
    "ckpt_path": ("run.root", f"{_FOLDER}, with checkpoints/"),
    "remote_rm_url": ("reward.functions", "a function of yours calls it: docs/rewards.md"),
    "agent_func_path": ("agent.environment", "docs/agents.md"),
    "use_wandb": ("tracking.to", _TRACKERS),
    "use_tensorboard": ("tracking.to", _TRACKERS),
    "wandb_project": ("tracking.project", ""),
    "wandb_org": ("tracking.wandb_entity", ""),
    "wandb_run_name": ("run.name", ""),
    "gradient_checkpointing": ("actor.gradient_checkpointing", ""),
    "bf16": ("actor.dtype", "true is bfloat16, false float32"),
    "lora_rank": ("actor.lora.rank", ""),
    "lora_alpha": ("actor.lora.alpha", ""),
    "target_modules": ("actor.lora.target_modules", ""),
    "actor_num_gpus_per_node": ("trainer.num_ranks", ""),
    "vllm_num_engines": ("rollout.num_servers", ""),
    "vllm_tensor_parallel_size": ("rollout.engine.tensor_parallel_size", ""),
    "vllm_gpu_memory_utilization": ("rollout.engine.memory_fraction", _FREE_SHARE),
    "vllm_enable_sleep": ("trainer.take_turns", ""),
}

OTHER_NAMES = tuple(
    OtherName(library, name, key, note)
    for library, names in (("TRL", _TRL), ("verl", _VERL), ("AReaL", _AREAL), ("OpenRLHF", _OPENRLHF))
    for name, (key, note) in names.items()
)


def other_names_of(key: str) -> tuple[OtherName, ...]:
    """What the others call a key."""
    return tuple(each for each in OTHER_NAMES if each.key == key)


def called(name: str) -> tuple[OtherName, ...]:
    """Those that a user of one of the libraries calls `name`; those of exactly this name, if there are any."""
    plain = _plain(name)
    exact = tuple(each for each in OTHER_NAMES if each.name == plain)
    return exact or tuple(each for each in OTHER_NAMES if each.is_called(plain))


def ending_like(name: str) -> tuple[OtherName, ...]:
    """Those that end `name`, which stands in a section of ours: `optimizer.learning_rate`."""
    return next((found for end in _ends(_plain(name)) if (found := called(end))), ())


def _ends(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[start:]) for start in range(1, len(parts)))


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
