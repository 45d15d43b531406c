"""Greedy completions by vLLM in fp32: vllm_worker.py MODEL NUM_NEW_TOKENS reads prompts (token ids) as JSON from its
input and prints the generated tokens as JSON on its last line."""

import json
import sys

from megatron_tpt.generation import EngineOptions, Sampling, VLLMEngine, complete


def main() -> None:
    prompts = json.load(sys.stdin)
    num_new_tokens = int(sys.argv[2])
    options = EngineOptions(model=sys.argv[1], max_model_len=len(prompts[0]) + num_new_tokens, dtype="float32")
    with VLLMEngine(options) as engine:
        completions = complete(engine, prompts, Sampling(temperature=0, max_new_tokens=num_new_tokens))
    print(json.dumps([completion.token_ids for completion in completions]))


if __name__ == "__main__":
    main()
