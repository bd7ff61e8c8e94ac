"""`cdist export`: a student in the form other tools load, verified before it is published."""
