"""A model in the files of other programs: GGUF for llama.cpp, and a Modelfile for Ollama."""
