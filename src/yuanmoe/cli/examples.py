"""One example a command, at the end of its help; tests run them, in this order, in a folder with the files they name.

Not here: what the options mean (each command's own file).
"""

EXAMPLES = {
    "": 'yuanmoe generate "def read_lines(path):"',
    "plan": "yuanmoe plan M32 --bits 4 --ram 24GiB",
    "doctor": "yuanmoe doctor --model small",
    "convert": "yuanmoe convert Yuan2-M32-hf M32-native",
    "verify": "yuanmoe verify small",
    "quantize": "yuanmoe quantize Yuan2-M32-hf M32-4bit --bits 4",
    "generate": 'yuanmoe generate "def read_lines(path):" --temperature 0.5 --show-experts',
    "chat": "yuanmoe chat --model M32-4bit --kv-dtype int8",
    "serve": "yuanmoe serve --model small --cache-tokens 16384",
    "api-key": "yuanmoe api-key alice --file keys.txt",
    "inspect": "yuanmoe inspect --model small --text README.md --html experts.html",
    "data": "yuanmoe data pack README.md notes --tokenizer small",
    "data pack": "yuanmoe data pack src README.md tokens --tokenizer small --suffix .py --heldout 0.1",
    "data info": "yuanmoe data info tokens/train",
    "data verify": "yuanmoe data verify tokens/train --tokenizer small",
    "data preview": "yuanmoe data preview tokens/train --document 2",
    "data export": "yuanmoe data export tokens/train tokens/megatron",
    "bench": "yuanmoe bench layers --preset small --layers 2",
    "bench layers": "yuanmoe bench layers --preset small --layers 2 --prompt-tokens 64",
    "bench decode": "yuanmoe bench decode --model small --contexts 16,256 --prompts 32",
    "bench table": "yuanmoe bench table README.md --measurements docs/measurements",
    "train": "yuanmoe train small --data tokens --out runs/first --set schedule.max_tokens=4096",
    "adapter": "yuanmoe adapter show my-adapter",
    "adapter show": "yuanmoe adapter show my-adapter",
    "adapter merge": "yuanmoe adapter merge my-adapter M32-mine --model Yuan2-M32-hf",
    "adapter export-peft": "yuanmoe adapter export-peft my-adapter my-adapter-peft",
    "demo": "yuanmoe demo",
}
"""By the words that call the command; the first is that of the program itself."""
