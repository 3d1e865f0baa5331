//! The address on which a rank's collective listens.

use std::ffi::CStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use phalanx_kernels::CollectiveError;

use super::setup;

/// The address of an interface (or an address itself); of the way out of this machine where none is named.
pub(super) fn address(interface: &str) -> Result<IpAddr, CollectiveError> {
    if interface.is_empty() {
        return Ok(outward().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)));
    }
    if let Ok(ip) = interface.parse() {
        return Ok(ip);
    }
    let all = addresses().map_err(|e| setup(format!("the interfaces of this machine: {e}")))?;
    let mut of_it: Vec<IpAddr> = all.iter().filter(|(name, _)| name == interface).map(|(_, ip)| *ip).collect();
    of_it.sort_by_key(|ip| ip.is_ipv6());
    of_it.first().copied().ok_or_else(|| {
        let mut names: Vec<&str> = all.iter().map(|(name, _)| name.as_str()).collect();
        names.dedup();
        setup(format!("no interface {interface} with an address; this machine has {}", names.join(", ")))
    })
}

/// The interface that has an address, as NCCL wants it named; `None` where none has it.
pub fn name_of(ip: IpAddr) -> Option<String> {
    addresses().ok()?.into_iter().find(|(_, of_it)| *of_it == ip).map(|(name, _)| name)
}

/// The source address of packets that leave this machine. Nothing is sent: connecting a datagram socket only asks the
/// routes, and the address is one that is kept for documents (RFC 5737).
fn outward() -> Option<IpAddr> {
    let by_route = || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
        socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
        Some(socket.local_addr().ok()?.ip())
    };
    let by_interface = || addresses().ok()?.into_iter().map(|(_, ip)| ip).find(|ip| !ip.is_loopback() && ip.is_ipv4());
    by_route().or_else(by_interface)
}

/// Names and addresses of the interfaces that are up.
fn addresses() -> std::io::Result<Vec<(String, IpAddr)>> {
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: on success the call stores a list that is freed below, once.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    let mut found = Vec::new();
    let mut next = list;
    while !next.is_null() {
        // SAFETY: a non-null entry of the list, which is alive until it is freed.
        let entry = unsafe { &*next };
        let is_up = entry.ifa_flags & libc::IFF_UP as libc::c_uint != 0;
        if is_up && let Some(ip) = address_of(entry) {
            // SAFETY: the name of an entry is a C string as long-lived as the entry.
            let name = unsafe { CStr::from_ptr(entry.ifa_name) };
            found.push((name.to_string_lossy().into_owned(), ip));
        }
        next = entry.ifa_next;
    }
    // SAFETY: the list came from getifaddrs, and nothing refers to it any more.
    unsafe { libc::freeifaddrs(list) };
    Ok(found)
}

fn address_of(entry: &libc::ifaddrs) -> Option<IpAddr> {
    if entry.ifa_addr.is_null() {
        return None;
    }
    // SAFETY: non-null, and the family says which address structure stands there.
    unsafe {
        match i32::from((*entry.ifa_addr).sa_family) {
            libc::AF_INET => {
                let v4 = &*entry.ifa_addr.cast::<libc::sockaddr_in>();
                Some(IpAddr::V4(Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr))))
            }
            libc::AF_INET6 => {
                let v6 = Ipv6Addr::from((*entry.ifa_addr.cast::<libc::sockaddr_in6>()).sin6_addr.s6_addr);
                // A link-local address means nothing without its link.
                (!v6.is_unicast_link_local()).then_some(IpAddr::V6(v6))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_names_are_both_taken() {
        assert_eq!(address("127.0.0.1").unwrap(), IpAddr::V4(Ipv4Addr::LOCALHOST));
        assert!(address("lo").unwrap().is_loopback());
        let error = address("no-such-link").unwrap_err().to_string();
        assert!(error.contains("no-such-link") && error.contains("lo"), "{error}");
        address("").unwrap();
        assert_eq!(name_of(IpAddr::V4(Ipv4Addr::LOCALHOST)).as_deref(), Some("lo"));
        assert_eq!(name_of(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1))), None);
    }
}
