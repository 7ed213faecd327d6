-- Logins of present and former passwords, with their sessions.
SELECT
    rolname::text AS login,
    count(pid)::int AS sessions,
    string_agg(
        format('%s from %s since %s', rolname, coalesce(host(client_addr), 'this host'), date_trunc('second', backend_start)),
        ', ' ORDER BY backend_start
    ) FILTER (WHERE pid IS NOT NULL) AS described
FROM pg_roles
LEFT JOIN pg_stat_activity ON usesysid = pg_roles.oid
WHERE rolname ~ '^feast_.+_g[0-9a-f]{8}$'
GROUP BY rolname
ORDER BY rolname
