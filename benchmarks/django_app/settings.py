"""Django settings, from the environment."""

import os

SECRET_KEY = "a key for benchmarks"
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth", "django_webhook"]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ["BENCH_DJANGO_DATABASE"],
        "OPTIONS": {
            "timeout": 30,
            "transaction_mode": "IMMEDIATE",
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL",
        },
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
DJANGO_WEBHOOK = {"MODELS": ["auth.User"], "STORE_EVENTS": True}
