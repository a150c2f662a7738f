//! What every Homeport service needs: settings, metrics, health, shutdown.
