"""Methods of personalisation compared on people's own later answers: `mta eval`, a bank's verdict, and studies."""
