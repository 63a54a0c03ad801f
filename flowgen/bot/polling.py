"""The bot at work: it asks Telegram for messages, and needs no address of its own."""

import threading
from collections.abc import Callable
from pathlib import Path

from telegram.error import InvalidToken, NetworkError
from telegram.ext import ApplicationBuilder, MessageHandler, filters

from flowgen.answers import Answers, leave
from flowgen.bot.chat import Chat
from flowgen.bot.token import mask_logs, read_token
from flowgen.errors import FlowgenError
from flowgen.messages import one_sentence

AT_ONCE = 16  # chats


def bot(
    *, name: str | None, token_file: Path | None, allowed: tuple[int, ...], api: str | None, device: str, say: Callable[[str], None]
) -> None:
    """Answer until interrupted; `api` is a server of the Bot API other than Telegram's own. Raises FlowgenError."""
    token = read_token(token_file)
    answers = Answers(name, device)
    mask_logs(token)

    async def begin(_: object) -> None:  # once Telegram has taken the token: a thread at work would abort a process that ends before
        threading.Thread(target=answers.judge_validation_images, daemon=True).start()

    builder = ApplicationBuilder().token(token).concurrent_updates(AT_ONCE).post_init(begin)
    if api is not None:
        builder = builder.base_url(f"{api.rstrip('/')}/bot").base_file_url(f"{api.rstrip('/')}/file/bot")
    application = builder.build()
    chat = Chat(answers, allowed)
    application.add_handler(MessageHandler(filters.ALL, chat.hear))
    application.add_error_handler(chat.stumble)
    say(f"{answers.name} chats until Ctrl-C")
    try:
        application.run_polling(allowed_updates=["message"])
    except InvalidToken:
        raise FlowgenError("Telegram refuses the token: get another from @BotFather") from None  # its own sentence holds the token
    except NetworkError as error:
        raise FlowgenError(f"Telegram cannot be reached ({type(error).__name__}): try again later") from None
    except Exception as error:
        raise FlowgenError(one_sentence(error).replace(token, "TOKEN")) from None
    leave()
