//! Backups around the clock.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use service::{Health, State};
use tokio_util::sync::CancellationToken;

use super::manifest::{Kind, id_of};
use super::{BackupError, BackupReport, BackupTarget, Backups, TargetError};
use crate::metrics::Metrics;
use crate::time_of_day::wall_ms;

/// How long to wait after a backup that failed.
const RETRY: Duration = Duration::from_secs(300);

/// When backups are made, and how long they are kept.
#[derive(Debug, Clone)]
pub struct BackupConfig {
    /// Where to.
    pub target: BackupTarget,
    /// How often. Default 6 h.
    pub every: Duration,
    /// How often everything is written anew. Default 7 days.
    pub full_every: Duration,
    /// How long backups are kept. Default 30 days.
    pub keep: Duration,
}

/// Makes backups until it is told to stop.
pub(crate) struct BackupSchedule {
    pub(crate) config: BackupConfig,
    pub(crate) backups: Backups,
    pub(crate) data: PathBuf,
    pub(crate) metrics: Metrics,
    pub(crate) health: Health,
}

impl BackupSchedule {
    pub(crate) fn new(
        config: BackupConfig,
        data: PathBuf,
        metrics: Metrics,
        health: Health,
    ) -> Result<Self, TargetError> {
        let backups = Backups::at(&config.target)?;
        Ok(Self { config, backups, data, metrics, health })
    }

    pub(crate) async fn run(self, stop: CancellationToken) {
        let mut next = Instant::now();
        // After a restart, the last backup counts as well.
        match self.last().await {
            Ok(Some((_, made_ms))) => {
                self.made(made_ms);
                self.health.set("backup", State::Ok);
                let age = Duration::from_millis(wall_ms().saturating_sub(made_ms));
                next += self.config.every.saturating_sub(age);
            }
            Ok(None) => {}
            Err(error) => self.failed(&error),
        }
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep_until(next.into()) => {}
            }
            let start = Instant::now();
            let result = tokio::select! {
                () = stop.cancelled() => return,
                result = self.back_up() => result,
            };
            next = Instant::now()
                + match result {
                    Ok(report) => {
                        self.metrics.backup_seconds.observe(start.elapsed().as_secs_f64());
                        self.metrics.backup_bytes.inc_by(report.written_bytes);
                        self.health.set("backup", State::Ok);
                        tracing::info!(
                            id = %report.id, operations = report.operations, bytes = report.written_bytes,
                            "the archive is backed up"
                        );
                        self.config.every
                    }
                    Err(error) => {
                        self.failed(&error);
                        self.config.every.min(RETRY)
                    }
                };
        }
    }

    async fn back_up(&self) -> Result<BackupReport, BackupError> {
        let last_full = self.last_full().await?;
        let is_full_due = last_full
            .is_none_or(|made_ms| Duration::from_millis(wall_ms().saturating_sub(made_ms)) >= self.config.full_every);
        let kind = if is_full_due { Kind::Full } else { Kind::Incremental };
        let report = self.backups.make(&self.data, kind, wall_ms()).await?;
        self.made(wall_ms());
        self.metrics.backups.with_label_values(&["made"]).inc();
        let pruned = self.backups.prune(self.config.keep, wall_ms()).await?;
        if pruned > 0 {
            tracing::info!(pruned, "old backups are deleted");
        }
        Ok(report)
    }

    /// The newest backup that is whole, and when it was made.
    async fn last(&self) -> Result<Option<(String, u64)>, BackupError> {
        Ok(self.backups.newest().await?.map(|manifest| (id_of(manifest.created_ms), manifest.created_ms)))
    }

    async fn last_full(&self) -> Result<Option<u64>, BackupError> {
        for id in self.backups.ids().await?.iter().rev() {
            match self.backups.manifest(id).await {
                Ok(manifest) if manifest.kind == Kind::Full => return Ok(Some(manifest.created_ms)),
                Ok(_) | Err(BackupError::Manifest { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// There is a backup of that time.
    fn made(&self, at_ms: u64) {
        self.metrics.backup_time.set(i64::try_from(at_ms / 1_000).unwrap_or(i64::MAX));
    }

    fn failed(&self, error: &BackupError) {
        self.metrics.backups.with_label_values(&["failed"]).inc();
        self.health.set("backup", State::Degraded(error.to_string()));
        tracing::error!(%error, target = %self.config.target, "the archive cannot be backed up");
    }
}
