"""What is measured of students and their teacher."""
