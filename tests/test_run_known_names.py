"""run/known_names.py: every name of another trainer leads to a flag that there is."""

from pathlib import Path

import pytest

from run.config import build_parser, read_given
from run.known_names import ALSO, ELSEWHERE

PAGE = Path(__file__).resolve().parent.parent / "docs" / "flags.md"
FLAGS = {name: action for action in build_parser()._actions for name in action.option_strings}


@pytest.mark.parametrize("name", ALSO)
def test_a_known_name_is_one_of_our_flags(name: str) -> None:
    bare, _, of_value = name.partition(" ")
    ours, _, value = ALSO[name].partition(" ")
    assert bare not in FLAGS or of_value, "a flag of ours needs no other name"
    assert not ours or ours in FLAGS
    # a beginning of a value goes on with what is typed
    rest = "x" if value.endswith("=") else ""
    if value:
        assert read_given([*name.split(), *rest]) == read_given([f"{ours}={value}{rest}"])
    # a name that says how it is anyway, or some of it, says so with this value only
    assert not of_value or bare in {*ALSO, *ELSEWHERE, *FLAGS}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_not_here_is_answered(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert name not in FLAGS
    assert name not in ALSO
    with pytest.raises(SystemExit):
        read_given([name.replace("-", "_").replace("__", "--", 1), "other"])
    message = capsys.readouterr().err
    # it names flags that there are
    for word in message.translate(str.maketrans(",;:=", "    ")).split():
        if word.startswith("--") and word.replace("_", "-") != name and word != "--help":
            assert word in FLAGS, word


def test_a_command_of_transformers_and_trl_is_read() -> None:
    typed = """
        --model_name_or_path a --dataset_name b --output_dir c --per_device_train_batch_size 2
        --gradient_accumulation_steps 8 --learning_rate 1e-4 --num_train_epochs 3 --bf16 True
        --lr_scheduler_type cosine --warmup_ratio 0.1 --max_seq_length 512 --lora_r 8
        --lora_alpha 16 --optim paged_adamw_8bit --packing False --load_in_4bit True
        --report_to tensorboard --logging_steps 5 --save_steps 50 --seed 3
    """
    given = read_given(typed.split())
    assert given == {
        "model": "a",
        "data": "b",
        "output": "c",
        "batch_size": 2,
        "gradient_accumulation_steps": 8,
        "learning_rate": 1e-4,
        "epochs": 3.0,
        "dtype": "bfloat16",
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.1,
        "warmup_steps": 0,
        "max_length": 512,
        "lora_r": 8,
        "lora_alpha": 16.0,
        "optim": "paged_adamw_8bit",
        "packing": False,
        "quant": "nf4",
        "report_to": "tensorboard",
        "logging_steps": 5,
        "save_steps": 50,
        "seed": 3,
    }


def test_a_command_of_unsloth_is_read() -> None:
    typed = """
        --model_name a --dataset b --max_seq_length 512 --dtype None --load_in_4bit --r 8
        --lora_alpha 16 --lora_dropout 0 --bias none --use_gradient_checkpointing unsloth
        --random_state 3407 --seed 3407 --loftq_config None --per_device_train_batch_size 2
        --warmup_steps 5 --max_steps 60 --optim adamw_8bit --lr_scheduler_type linear
        --report_to none --output_dir outputs
    """
    assert read_given(typed.split()) == {
        "model": "a",
        "data": "b",
        "max_length": 512,
        "dtype": "auto",
        "quant": "nf4",
        "lora_r": 8,
        "lora_alpha": 16.0,
        "lora_dropout": 0.0,
        "activations": "auto",
        "seed": 3407,
        "batch_size": 2,
        "warmup_steps": 5,
        "warmup_ratio": 0.0,
        "max_steps": 60,
        "optim": "paged_adamw_8bit",
        "lr_scheduler": "linear",
        "report_to": "",
        "output": "outputs",
    }


@pytest.mark.parametrize(
    ("typed", "field", "value"),
    [
        ("--dtype bf16", "dtype", "bfloat16"),
        ("--dtype fp16", "dtype", "float16"),
        ("--dtype fp32", "dtype", "float32"),
        ("--dtype None", "dtype", "auto"),
        ("--lr_scheduler_type constant_with_warmup", "lr_scheduler", "constant"),
        ("--optim adamw_torch", "optim", "adamw"),
        ("--optim paged_adamw", "optim", "paged_adamw_32bit"),
        ("--text_field body", "fields", "text=body"),
        ("--dataset_text_field=a=b", "fields", "text=a=b"),
        ("--resume", "resume", "auto"),
        ("--no_resume", "resume", ""),
    ],
)
def test_values_have_their_other_names(typed: str, field: str, value: str) -> None:
    assert read_given(typed.split()) == {field: value}


def test_the_page_lists_them() -> None:
    """A name's underscores are how most people know it."""
    said = {name: f"`{ours}`" if ours else "how it is anyway" for name, ours in ALSO.items()}
    also = [f"| `{_known(name)}` | {ours} |" for name, ours in said.items()]
    elsewhere = [f"| `{_known(name)}` | {what} |" for name, what in ELSEWHERE.items()]
    text = PAGE.read_text()
    assert "\n".join(also) in text
    assert "\n".join(elsewhere) in text


def _known(name: str) -> str:
    return "--" + name[2:].replace("-", "_")
