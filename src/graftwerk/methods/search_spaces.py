"""Default search spaces of the methods, as `graftwerk search` takes them: settings in the order of what they matter.

``a..b`` is a range, on a logarithmic scale if it spans a factor of ten or more; ``a,b,c`` are choices. The learning
rate comes first: tuning it moves a score more than the method does (IA3 from 31 to 46, prefixes from 19 to 42 points on
GSM8K in PEFT's own benchmark). Each range holds the method's default rate, with a factor of ten to either side.
"""

from __future__ import annotations

from collections.abc import Mapping

SEARCH_SPACES: Mapping[str, Mapping[str, str]] = {
    "lora": {
        "learning_rate": "1e-4..1e-2",
        "r": "4,8,16,32",
        "target_modules": "attention,all-linear",
        "lora_dropout": "0.0,0.1",
        "num_train_epochs": "2,3,5",
    },
    "miss": {
        "learning_rate": "1e-4..1e-2",
        "r": "16,32,64",
        "target_modules": "attention,all-linear",
        "miss_dropout": "0.0,0.1",
        "num_train_epochs": "2,3,5",
    },
    "hira": {
        "learning_rate": "3e-4..3e-2",
        "r": "8,16,32",
        "target_modules": "attention,all-linear",
        "hira_dropout": "0.0,0.1",
        "num_train_epochs": "2,3,5",
    },
    "shira": {
        "learning_rate": "1e-4..1e-2",
        "r": "8,16,32,64",
        "target_modules": "attention,all-linear",
        "num_train_epochs": "2,3,5",
    },
    "oft": {
        "learning_rate": "1e-4..1e-2",
        "oft_block_size": "16,32,64",
        "target_modules": "attention,all-linear",
        "num_train_epochs": "2,3,5",
    },
    "bottleneck": {  # null: 16, or the run file's adapter_size
        "learning_rate": "1e-4..1e-2",
        "reduction_factor": "4,8,null,32",
        "placement": "houlsby,pfeiffer,parallel",
        "num_train_epochs": "2,3,5",
    },
    "prefix": {
        "learning_rate": "3e-3..3e-1",
        "num_virtual_tokens": "10,20,50",
        "prefix_projection": "false,true",
        "num_train_epochs": "2,3,5",
    },
    "prompt": {"learning_rate": "3e-3..3e-1", "num_virtual_tokens": "10,20,50", "num_train_epochs": "3,5,10"},
    "ptuning": {
        "learning_rate": "3e-4..3e-2",
        "num_virtual_tokens": "10,20,50",
        "encoder_reparameterization_type": "MLP,LSTM",
        "num_train_epochs": "2,3,5",
    },
    "ia3": {"learning_rate": "1e-3..1e-1", "num_train_epochs": "2,3,5"},
    "bitfit": {"learning_rate": "3e-4..3e-2", "num_train_epochs": "2,3,5"},
    "probe": {"learning_rate": "1e-3..1e-1", "num_train_epochs": "3,5,10"},
    "full": {"learning_rate": "5e-6..5e-4", "weight_decay": "0.0,0.01,0.1", "num_train_epochs": "2,3,5"},
}
"""By method: values to try by setting, of the method or of the training."""
