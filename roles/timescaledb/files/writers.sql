-- Sessions of src/larder that write bars or features.
SELECT format('%s from %s since %s', application_name, coalesce(client_addr::text, 'this host'), date_trunc('second', backend_start))
    AS described
FROM pg_stat_activity
WHERE datname = current_database() AND application_name IN ('larder run', 'larder load', 'larder compute')
