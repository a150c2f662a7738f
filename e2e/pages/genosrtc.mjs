// Stands in for utils.js of Trystero 0.21 (see transport.html): all of it, but for the name that topics begin with.
export * from '/node_modules/trystero-2025/src/utils.js?original';
export const libName = 'GenosRTC';
