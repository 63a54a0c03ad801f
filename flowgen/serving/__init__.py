"""The web page and the Telegram bot, which let a user play with a trained model."""
