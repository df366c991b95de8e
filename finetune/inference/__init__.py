"""Measures and runs a model in bounded memory: losses, log-probabilities, KL divergence, answers, bootstrap intervals.

Shared by all stages. Import from the module that has the function, so that importing the package stays light:

    from finetune.inference.losses import mean_loss, row_losses

    print(mean_loss(row_losses(model, rows, batch_tokens=2048)))
"""
