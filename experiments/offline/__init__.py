"""The offline phase: head profiles, and training of predictors and of the embedded model."""
