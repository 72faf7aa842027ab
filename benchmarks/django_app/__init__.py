"""django-webhook on Celery, set up as its documentation says: what our figures are compared with."""
