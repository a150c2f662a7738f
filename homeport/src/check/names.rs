//! Names, and the addresses that they lead to.

use std::collections::BTreeSet;
use std::net::IpAddr;

use tokio::net::lookup_host;
use turn_server::Addresses;

use super::Finding;
use crate::settings::Settings;

/// The host of a URL.
pub(super) fn host_of(url: &str) -> Option<&str> {
    let rest = url.split_once("://")?.1;
    let authority = rest.split(['/', '?', '#']).next()?;
    match authority.strip_prefix('[') {
        Some(v6) => v6.split(']').next(),
        None => authority.split(':').next(),
    }
    .filter(|host| !host.is_empty())
}

/// Looks the names up under which apps reach the services, and whether that is here.
pub(super) async fn look_up(settings: &Settings) -> Vec<Finding> {
    let url = settings.relay_url();
    let names: BTreeSet<&str> = url
        .as_deref()
        .and_then(host_of)
        .into_iter()
        .chain(settings.turn.host.as_deref())
        .chain(settings.acme().into_iter().flat_map(|acme| acme.domains.iter().map(String::as_str)))
        .filter(|name| name.parse::<IpAddr>().is_err())
        .collect();
    let Ok(external) = settings.turn_external_ips() else { return Vec::new() };
    let own = Addresses::find(&external, settings.turn.listen.ip()).await;
    let own: Vec<IpAddr> = [own.v4, own.v6].into_iter().flatten().map(|own| own.public).collect();
    let mut findings = Vec::new();
    for name in names {
        let what = format!("name {name}");
        let addresses: BTreeSet<IpAddr> = match lookup_host((name, 0)).await {
            Ok(found) => found.map(|address| address.ip().to_canonical()).collect(),
            Err(error) => {
                let advice = "make a record of it (A, and AAAA for IPv6) that leads to this machine";
                findings.push(Finding::failure(what, format!("it leads nowhere: {error}"), advice));
                continue;
            }
        };
        let shown =
            |list: &mut dyn Iterator<Item = &IpAddr>| list.map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let found = format!("it leads to {}", shown(&mut addresses.iter()));
        findings.push(if addresses.iter().any(|address| own.contains(address) || address.is_loopback()) {
            Finding::ok(what, found)
        } else {
            let advice = format!(
                "if that is not a proxy in front: correct the name's record, or turn.external_ip, by which this machine is {}",
                shown(&mut own.iter())
            );
            Finding::failure(what, found, advice)
        });
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_has_a_host() {
        for (url, expected) in [
            ("wss://relay.example.com", Some("relay.example.com")),
            ("ws://relay.example.com:8080/x?y", Some("relay.example.com")),
            ("ws://[::1]:8080", Some("::1")),
            ("relay.example.com", None),
            ("ws://", None),
        ] {
            assert_eq!(host_of(url), expected, "{url}");
        }
    }
}
