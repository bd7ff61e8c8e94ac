"""The student: join, losses, recipes, trainer. Never loads a teacher."""
