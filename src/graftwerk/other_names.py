"""Names that other tools have for what a run file says: of transformers, PEFT, LLaMA-Factory, Axolotl and TRL.

Only messages use them: a name of theirs is still an error, which leads to ours. That a name means one thing there and
another here (a rank of LoRA and a number of blocks) is why they are not simply accepted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

_NAMES = {
    "model": "model_name_or_path model_name model_id model_path base_model pretrained_model_name_or_path checkpoint",
    "revision": "model_revision",
    "quantization": "quantization_config bnb_config quant_method quantization_method bnb_4bit_quant_type quantize",
    "quantization.double_quant": "bnb_4bit_use_double_quant use_double_quant double_quantization use_nested_quant",
    "quantization.compute_type": "bnb_4bit_compute_dtype bnb_4bit_compute_type",
    "quantization.skip": "llm_int8_skip_modules modules_to_not_convert",
    "task": "task_type task_name stage problem_type",
    "method": "adapter peft_type peft_method finetuning_type peft peft_config",
    "output_dir": "output run_name logging_dir save_dir output_path",
    "data.train": "dataset datasets dataset_name dataset_path train_file train_dataset train_data data_path data_files",
    "data.validation": "validation_file eval_file eval_dataset val_size val_set_size dev validation_split eval_data",
    "data.test": "test_file test_dataset test_size test_split test_data",
    "data.columns": "text_column label_column text_field dataset_text_field column field columns_mapping",
    "data.delimiter": "sep separator csv_delimiter field_separator",
    "data.encoding": "charset file_encoding",
    "data.format": "dataset_format",
    "data.max_length": "max_seq_length max_seq_len max_len cutoff_len sequence_len seq_length model_max_length "
    "block_size max_source_length context_length",
    "data.max_train_rows": "max_samples max_train_samples max_rows",
    "data.split_seed": "data_seed shuffle_seed",
    "data.on_bad_row": "on_bad_rows on_bad_lines",
    "training.num_train_epochs": "epochs epoch num_epochs n_epochs max_epochs train_epochs",
    "training.max_steps": "steps num_steps max_train_steps total_steps",
    "training.per_device_train_batch_size": "batch_size train_batch_size micro_batch_size per_gpu_train_batch_size bs",
    "training.per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size val_batch_size",
    "training.gradient_accumulation_steps": "grad_accum accumulation_steps grad_accumulation_steps "
    "accumulate_grad_batches",
    "training.learning_rate": "lr peak_lr base_lr max_lr",
    "training.lr_scheduler_type": "lr_scheduler scheduler lr_schedule scheduler_type",
    "training.warmup_ratio": "warmup_steps warmup num_warmup_steps",
    "training.weight_decay": "wd decay",
    "training.max_grad_norm": "gradient_clipping grad_clip clip_grad_norm gradient_clip_val max_norm",
    "training.label_smoothing": "label_smoothing_factor",
    "training.class_weights": "class_weight weights loss_weights",
    "training.length_group": "group_by_length",
    "training.packing": "sample_packing pack",
    "training.gradient_checkpointing": "use_gradient_checkpointing activation_checkpointing",
    "training.compute_type": "fp16 bf16 tf32 precision mixed_precision torch_dtype dtype half",
    "training.seed": "random_state random_seed",
    "training.eval_steps": "eval_strategy evaluation_strategy evals_per_epoch eval_every",
    "training.save_steps": "save_strategy saves_per_epoch save_every",
    "training.save_total_limit": "keep_checkpoints",
    "training.early_stopping_patience": "patience early_stopping",
    "training.load_best": "load_best_model_at_end",
    "training.metric_for_best": "metric_for_best_model greater_is_better",
    "training.warm_start": "adapter_name_or_path lora_model_dir init_from",
    "training.report_to": "wandb_project wandb use_wandb tensorboard",
    "training.processes": "num_processes n_jobs nproc_per_node",
    "training.logging_steps": "log_steps log_every",
    "evaluation.max_new_tokens": "max_tokens max_target_length generation_max_length max_generate_length",
    "evaluation.num_beams": "generation_num_beams beams",
    "evaluation.generate": "predict_with_generate do_predict",
    "evaluation.temperature": "sampling_temperature do_sample",
    "method.r": "rank lora_r lora_rank lora_dim",
    "method.lora_alpha": "alpha",
    "method.lora_dropout": "dropout",
    "method.target_modules": "lora_target lora_target_modules lora_target_linear modules",
    "method.modules_to_save": "lora_modules_to_save additional_target",
    "method.use_dora": "peft_use_dora lora_use_dora dora",
    "method.use_rslora": "peft_use_rslora lora_use_rslora rslora",
    "method.layers": "layers_to_transform lora_layers num_layer_trainable freeze_trainable_layers",
    "method.num_virtual_tokens": "prefix_length prompt_length num_tokens",
    "method.loraplus_lr_ratio": "lora_plus_ratio lr_ratio",
}
_SAID = {
    "overwrite_output_dir": "`--overwrite` (overwrite=True) replaces a run",
    "resume_from_checkpoint": "`--resume` (resume=True) resumes the run in `output_dir`",
    "optim": "there is one optimizer, AdamW: `training.weight_decay`, `training.adam_beta1`, ...",
    "optimizer": "there is one optimizer, AdamW: `training.weight_decay`, `training.adam_beta1`, ...",
    "num_labels": "the classes are those of the rows; leave it out",
    "tokenizer": "the tokenizer is the model's; leave it out",
    "device": "the fastest device is taken; CUDA_VISIBLE_DEVICES chooses among several",
    "load_in_4bit": "here it is `quantization: nf4`",
    "load_in_8bit": "here it is `quantization: int8`",
    "quantization_bit": "here it is `quantization: nf4` (4 bits) or `quantization: int8` (8 bits)",
    "push_to_hub": "`graftwerk export RUN` writes a folder to hand over; leave it out",
    "trust_remote_code": "code of a model's folder is never run; leave it out",
}
OTHER_NAMES = MappingProxyType(
    {name: key for key, names in _NAMES.items() for name in (key.rpartition(".")[2], *names.split())} | _SAID
)
"""Name elsewhere -> dotted key here, or a sentence where there is no such key."""


def lead(name: str, parent: str, known: Collection[str], homes: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the words that lead from a name of another tool, or a key in the wrong place, to the key here.

    Args:
        name: An unknown key, as it was given.
        parent: Dotted key of the settings in which it was given, "" at the top of a run file.
        known: Keys that these settings have.
        homes: Further dotted keys, by their last part.

    Returns:
        The words, or "" if the name is not known.

    Example:
        >>> lead("lora_alpha", "training", ())
        'here it is `method.lora_alpha`'
        >>> lead("lr", "training", ["learning_rate"])
        'here it is `learning_rate`'
    """
    found = OTHER_NAMES.get(name.casefold().replace("-", "_")) or homes.get(name, "")
    if " " in found or not found:
        return found
    home, _, last = found.rpartition(".")
    if home != parent:
        return f"here it is `{found}`"
    return f"here it is `{last}`" if last in known and last != name else ""


OTHER_METHODS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("qlora", "q-lora", "lora-4bit"), "lora: QLoRA is LoRA on a base in 4 bits: "
                        "`quantization: nf4` beside `model`"),
        **dict.fromkeys(("loraplus", "lora+", "lora-plus"), "lora: LoRA+ is its `loraplus_lr_ratio`, for instance 16"),
        **dict.fromkeys(("adapter", "adapters", "adapter-tuning", "bottleneck-adapter", "series"), "bottleneck"),
        **dict.fromkeys(("prefix-tuning", "prefix_tuning", "prefixtuning"), "prefix"),
        **dict.fromkeys(("prompt-tuning", "prompt_tuning", "soft-prompt", "soft-prompts"), "prompt"),
        **dict.fromkeys(("p-tuning", "p_tuning", "ptuning-v1"), "ptuning"),
        **dict.fromkeys(("p-tuning-v2", "ptuning-v2", "p_tuning_v2"), "prefix"),
        **dict.fromkeys(("full-finetuning", "full_finetuning", "full-fine-tuning", "fine-tuning", "finetuning",
                         "finetune", "full_ft", "full-ft", "fft", "sft", "all"), "full"),
        **dict.fromkeys(("linear-probe", "linear_probe", "linear-probing", "head", "head-only", "frozen", "freeze"),
                        "probe"),
        **dict.fromkeys(("bias", "biases", "bias-only"), "bitfit"),
        **dict.fromkeys(("(ia)3", "ia^3", "(ia)^3"), "ia3"),
    }
)  # fmt: skip
"""Names of these methods elsewhere, each with ours, perhaps with words behind a colon."""
