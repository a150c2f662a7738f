//! Where backups are kept.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use object_store::ObjectStore;
use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::path::Path as Location;
use zeroize::Zeroizing;

/// How to reach storage that speaks S3. What is not said here is taken from the usual variables (`AWS_REGION`,
/// `AWS_ACCESS_KEY_ID`, …).
#[derive(Clone, Default, PartialEq, Eq)]
pub struct S3Settings {
    /// The address of a storage other than Amazon's, as `https://s3.example.com`. With `http://` nothing is encrypted.
    pub endpoint: Option<String>,
    /// The region.
    pub region: Option<String>,
    /// The id of the access key.
    pub access_key_id: Option<String>,
    /// The access key.
    pub secret_access_key: Option<Zeroizing<String>>,
}

impl fmt::Debug for S3Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Settings")
            .field("endpoint", &self.endpoint)
            .field("region", &self.region)
            .finish_non_exhaustive()
    }
}

/// Where backups are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackupTarget {
    /// A folder, which is made if it is not there.
    Folder(PathBuf),
    /// A bucket, and what the names in it begin with.
    S3 {
        /// The bucket.
        bucket: String,
        /// The prefix; empty for none.
        prefix: String,
        /// How to reach it.
        settings: S3Settings,
    },
}

/// Backups cannot be kept there.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// The text names no place.
    #[error("{0:?} is no place for backups: it is a folder, or s3://bucket/prefix")]
    Unknown(String),
    /// The folder cannot be used.
    #[error("the folder {path}: {source}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The storage cannot be used.
    #[error(transparent)]
    Store(#[from] object_store::Error),
}

impl BackupTarget {
    /// Parses a folder, or `s3://bucket/prefix`.
    ///
    /// # Errors
    /// [`TargetError::Unknown`].
    pub fn parse(text: &str, settings: &S3Settings) -> Result<Self, TargetError> {
        let unknown = || TargetError::Unknown(text.to_owned());
        match text.split_once("://") {
            Some(("s3", place)) => {
                let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
                if bucket.is_empty() {
                    return Err(unknown());
                }
                Ok(Self::S3 { bucket: bucket.into(), prefix: prefix.into(), settings: settings.clone() })
            }
            Some(_) => Err(unknown()),
            None if text.is_empty() => Err(unknown()),
            None => Ok(Self::Folder(text.into())),
        }
    }

    pub(super) fn open(&self) -> Result<(Arc<dyn ObjectStore>, Location), TargetError> {
        match self {
            Self::Folder(path) => {
                let folder = |source| TargetError::Folder { path: path.clone(), source };
                std::fs::create_dir_all(path).map_err(folder)?;
                // What is said to be written is on the disk.
                let store = LocalFileSystem::new_with_prefix(path)?.with_fsync(true);
                Ok((Arc::new(store), Location::default()))
            }
            Self::S3 { bucket, prefix, settings } => {
                let mut builder = AmazonS3Builder::from_env().with_bucket_name(bucket);
                if let Some(endpoint) = &settings.endpoint {
                    builder = builder.with_endpoint(endpoint).with_allow_http(endpoint.starts_with("http://"));
                }
                if let Some(region) = &settings.region {
                    builder = builder.with_region(region);
                }
                if let Some(id) = &settings.access_key_id {
                    builder = builder.with_access_key_id(id);
                }
                if let Some(secret) = &settings.secret_access_key {
                    builder = builder.with_secret_access_key(secret.as_str());
                }
                let prefix = Location::parse(prefix).map_err(object_store::Error::from)?;
                Ok((Arc::new(builder.build()?), prefix))
            }
        }
    }
}

impl fmt::Display for BackupTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(path) => write!(f, "{}", path.display()),
            Self::S3 { bucket, prefix, .. } => write!(f, "s3://{bucket}/{prefix}"),
        }
    }
}
