// The stand-in's Security Manager (wire §6): it signs with ethers, and believes nobody who does not sign.
import { ethers } from '/node_modules/ethers/dist/ethers.min.js';

/** JSON with the keys of every object sorted. */
export const sorted = value => JSON.stringify(value, (_, inner) =>
  (inner && typeof inner === 'object' && !Array.isArray(inner)
    ? Object.fromEntries(Object.keys(inner).sort().map(key => [key, inner[key]])) : inner));

/** What each role may do, what it inherits included. */
const roles = {
  guest: [],
  user: ['upsert', 'link'],
  manager: ['upsert', 'link'],
  admin: ['upsert', 'link', 'remove'],
  superadmin: ['upsert', 'link', 'remove', 'assignRole'],
};

export class Security {
  constructor({ superAdmins }, nodes) {
    Object.assign(this, { superAdmins, nodes, wallet: undefined });
  }

  async sign(operation) {
    if (!this.wallet) return operation;
    const { originEthAddress, signature, ...rest } = { ...operation, originUser: this.wallet.address };
    return { ...rest, originEthAddress: this.wallet.address, signature: await this.wallet.signMessage(sorted(rest)) };
  }

  author({ originEthAddress, signature, ...rest }) {
    try {
      const author = ethers.verifyMessage(sorted(rest), signature);
      return author === originEthAddress && author === rest.originUser ? author : undefined;
    } catch {
      return undefined;
    }
  }

  role(address) {
    if (this.superAdmins.includes(address)) return 'superadmin';
    const value = this.nodes.get(`user:${address}`)?.value;
    return value?.expiresAt && Date.parse(value.expiresAt) <= Date.now() ? 'guest' : value?.role ?? 'guest';
  }

  /** What of an operation may be believed; `undefined` for nothing. */
  accepted(operation) {
    if (operation.type === 'sync') return operation;
    const author = this.author(operation);
    if (!author) return undefined;
    if (operation.type === 'deltaSync') {
      return { ...operation, operations: operation.operations.filter(inner => this.permits(this.author(inner) ?? author, inner)) };
    }
    if (operation.type === 'fullStateSync') {
      const permitted = Object.values(operation.graphData).filter(({ id, value }) => this.permits(author, { type: 'upsert', id, value }));
      return {
        ...operation,
        graphData: Object.fromEntries(permitted.map(node => [node.id, node])),
        removals: operation.removals.filter(({ id }) => this.permits(author, { type: 'remove', id })),
      };
    }
    return this.permits(author, operation) ? operation : undefined;
  }

  permits(author, { type, id, sourceId, value }) {
    const may = roles[this.role(author)] ?? [];
    if (may.includes('assignRole')) return true;
    const before = this.nodes.get(id ?? sourceId)?.value;
    if (id?.startsWith('user:')) return type === 'upsert' && id === `user:${author}` && value?.role === (before?.role ?? 'guest');
    const isOwn = !before?.owner || before.owner === author || ['write', 'delete'].includes(before.collaborators?.[author]);
    return may.includes(type) && isOwn;
  }

  interface({ put, get }) {
    return {
      loginOrRecoverUserWithMnemonic: async mnemonic => {
        this.wallet = ethers.Wallet.fromPhrase(mnemonic);
        const { address } = this.wallet;
        if (!(await get(`user:${address}`)).result && !this.superAdmins.includes(address)) {
          await put({ ethAddress: address, role: 'guest' }, `user:${address}`);
        }
        return { address };
      },
      assignRole: async (address, role, expiresAt) =>
        put({ ethAddress: address, role, ...(expiresAt ? { expiresAt } : {}) }, `user:${address}`),
      acls: {
        set: async (value, id) => put({ ...value, owner: this.wallet.address, collaborators: {} }, id),
        grant: async (id, address, permission) => {
          const { value } = (await get(id)).result;
          return put({ ...value, collaborators: { ...value.collaborators, [address]: permission } }, id);
        },
      },
    };
  }
}
