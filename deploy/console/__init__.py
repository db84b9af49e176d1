"""What looks at the console from outside: a browser, and the pictures of its pages."""
