//! Generates the wire types with protox, so that no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "proto/phalanx/v1/session.proto",
        "proto/phalanx/v1/agent.proto",
        "proto/phalanx/v1/admin.proto",
        "proto/phalanx/v1/heads.proto",
        "proto/etcd/v3.proto",
        "proto/phalanx/v1/trust.proto",
    ];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
