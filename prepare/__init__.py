"""What a run shall do: everything that was given, looked at before a model is loaded."""
