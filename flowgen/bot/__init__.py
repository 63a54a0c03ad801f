"""`flowgen bot`: a trained model that chats on Telegram."""
