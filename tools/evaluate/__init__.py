"""Evaluation by the log-likelihood of options: any Hugging Face VLM directory, any file of questions.

`tasks` reads and checks question files, `scoring` asks a model, `results` holds what came out. Only `scoring`
needs torch.
"""
