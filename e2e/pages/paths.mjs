// The way that data takes over each connection: the candidate types of both ends, and for a relayed one the protocol.
export async function path(connection) {
  // Firefox has no answer to this for a connection that is closed, or is being closed.
  const patience = new Promise(done => setTimeout(done, 2_000));
  const stats = await Promise.race([connection.getStats(), patience]);
  if (!stats) return undefined;
  const reports = [...stats.values()];
  const transport = reports.find(({ type, selectedCandidatePairId }) => type === 'transport' && selectedCandidatePairId);
  const pair = transport ? stats.get(transport.selectedCandidatePairId)
    // Firefox has no transports.
    : reports.find(({ type, nominated, state, selected }) => type === 'candidate-pair' && (selected ?? nominated) && state === 'succeeded');
  if (!pair) return undefined;
  const [local, remote] = [stats.get(pair.localCandidateId), stats.get(pair.remoteCandidateId)];
  return { local: local.candidateType, protocol: local.relayProtocol, remote: remote.candidateType, port: remote.port };
}
