"""`python -m baselines.llm360`: the command line of LLM360's unlearning tool."""
