//! `homeport rooms to-cluster` and `from-cluster`: from one machine to several and back, while no seed runs here.

use anyhow::Context as _;
use seed_peer::{Transfer, fetch_rooms, found_rooms};
use service::{Cluster, State, cluster::PART};

use crate::data_folder;
use crate::probe::PATIENCE;
use crate::settings::Settings;

/// Which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    To,
    From,
}

pub(super) fn transfer(settings: &Settings, way: Way) -> anyhow::Result<()> {
    let config = settings.cluster()?.context("there is no cluster to speak to (setting cluster.nats)")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let cluster = Cluster::connect(config).await?;
        let connected = async {
            while cluster.telemetry().health.parts().get(PART) != Some(&State::Ok) {
                // Nothing tells when it is: it is looked at.
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, connected).await.context("NATS does not answer (setting cluster.nats)")?;
        let data = &settings.seed.data;
        let each = |transfer: &Transfer| {
            println!("{}: {} operations", transfer.room.escape_debug(), transfer.operations);
        };
        let done = match way {
            Way::To => found_rooms(&cluster, data, each).await?,
            Way::From => {
                let fetched = fetch_rooms(&cluster, data, each).await;
                data_folder::give_to_its_owner(data)?;
                fetched?
            }
        };
        match way {
            Way::To => println!("{} rooms are in the cluster; start its machines", done.len()),
            Way::From => {
                println!("{} rooms are in {}; without [cluster], homeport has them alone", done.len(), data.display());
            }
        }
        Ok(())
    })
}
