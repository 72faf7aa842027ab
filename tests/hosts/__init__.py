"""Host apps in the shapes that exist, and what surrounds them."""
