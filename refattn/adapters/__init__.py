"""refattn inside other frameworks: one thin file each."""
