/** Owns what is read of a server's INFO line. */
export interface ServerInfo {
  /** Largest message that it takes. */
  readonly maxPayloadBytes: number;
  readonly isTlsRequired: boolean;
  /** host:port of the servers of its cluster. */
  readonly otherServers: readonly string[];
}

const MAX_SERVERS = 32;

/** Fields that it does not say, or not well, stay as they are. */
export function readServerInfo(json: string, known: ServerInfo): ServerInfo {
  let fields: Map<string, unknown>;
  try {
    fields = new Map(Object.entries(JSON.parse(json)));
  } catch {
    return known;
  }
  const maxPayload = fields.get('max_payload');
  const tlsRequired = fields.get('tls_required');
  const connectUrls = fields.get('connect_urls');
  return {
    maxPayloadBytes:
      typeof maxPayload === 'number' && Number.isInteger(maxPayload) && maxPayload > 0
        ? maxPayload
        : known.maxPayloadBytes,
    // A server that does not want it does not say so.
    isTlsRequired: tlsRequired === true,
    otherServers: Array.isArray(connectUrls)
      ? connectUrls.filter((url): url is string => typeof url === 'string').slice(0, MAX_SERVERS)
      : known.otherServers,
  };
}
