"""The offline phase: head statistics, head profiles, and predictors."""
