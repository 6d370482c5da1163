"""Tables, plots and the HTML page, drawn from run folders."""
